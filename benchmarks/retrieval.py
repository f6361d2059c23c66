"""Exact retrieval against its peers, side by side in one run.

    python benchmarks/retrieval.py --shape=sop --repeats=2
    python benchmarks/retrieval.py --shape=sop --scale=0.33 --methods=all
    python benchmarks/retrieval.py --shape=million
    python benchmarks/retrieval.py --shape=million --methods=held_1 --repeats=5

Random embeddings in clusters, unit length. For each method: the fastest of the
repeats, which alternate between the methods; the ratio to one full blocked matrix
product of the same shape; the peak memory above the inputs; and whether its answer is
that of abe_jax. Peers that are not installed are left out and named.
Read the ratios, not the seconds; a busy machine changes both.
"""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from side_by_side import measure

from abe_jax import retrieval

# Queries, gallery (None: the queries themselves), classes, ks.
SHAPES = {
    "sop": (60502, None, 11316, (1, 10, 100, 1000)),
    "inshop": (14218, 12612, 3985, (1, 10, 20, 30, 40, 50)),
    "million": (10000, 1000000, 100000, (1, 10)),
}
DIM = 512
USUAL = ("product", "recall", "all_metrics", "top_k_10", "faiss_10", "faiss_k", "torch")


def make_data(shape: str, scale: float, noise: float) -> dict[str, Any]:
    """Embeddings [Q, 512] and [N, 512] with labels."""
    queries, gallery, classes, ks = SHAPES[shape]
    rng = np.random.default_rng(0)
    queries, classes = int(queries * scale), max(2, int(classes * scale))
    centres = rng.standard_normal((classes, DIM), np.float32)

    def draw(number: int) -> tuple[np.ndarray, np.ndarray]:
        # Every class at least twice where there is room, the rest at random.
        labels = np.arange(number) % classes
        twice = min(number, 2 * classes)
        labels[twice:] = rng.integers(0, classes, number - twice)
        rng.shuffle(labels)
        rows = rng.standard_normal((number, DIM), np.float32)
        for start in range(0, number, 10000):
            part = slice(start, start + 10000)
            rows[part] = centres[labels[part]] + noise * rows[part]
            rows[part] /= np.linalg.norm(rows[part], axis=1, keepdims=True)
        return rows, labels

    q, y = draw(queries)
    data = {"q": q, "y": y, "g": q, "gy": y, "own": gallery is None, "ks": ks}
    if gallery is not None:
        data["g"], data["gy"] = draw(int(gallery * scale))
    return data


def gallery_arguments(data: dict[str, Any]) -> dict[str, Any]:
    if data["own"]:
        return {}
    return {"gallery_embeddings": data["g"], "gallery_labels": data["gy"]}


@jax.jit
def _best_in(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of a tile of queries: the maximum over rows `y`, in tiles as large."""
    tile = len(x)

    def body(j: jax.Array, best: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(y, j * tile, tile)
        sims = lax.dot_general(
            x, part, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )
        return jnp.maximum(best, sims.max(axis=1))

    return lax.fori_loop(0, len(y) // tile, body, jnp.full(len(x), -jnp.inf))


def product(data: dict[str, Any]) -> None:
    """The full matrix product in tiles that stay in the cache, and its maximum."""
    tile = 1024 if jax.default_backend() == "cpu" else 8192
    q, g = data["q"], data["g"]
    # The last tile's filling is multiplied as well: less than 2% of SOP's.
    step = 64 * tile
    out = []
    for start in range(0, len(g), step):
        part = g[start : start + step]
        y = jax.device_put(np.pad(part, ((0, -len(part) % tile), (0, 0))))
        for at in range(0, len(q), tile):
            x = q[at : at + tile]
            x = jnp.asarray(np.pad(x, ((0, tile - len(x)), (0, 0))))
            out.append(_best_in(x, y))
        jax.block_until_ready(out)


def recall_of_lists(index: np.ndarray, data: dict[str, Any]) -> dict[int, float]:
    """Recall@K from neighbour lists; a query in its own list is left out by index."""
    y, gy = data["y"], data["gy"]
    hit = gy[index] == y[:, None]
    if data["own"]:
        itself = index == np.arange(len(index))[:, None]
        hit[itself] = False
        rank = np.arange(index.shape[1]) - (np.cumsum(itself, axis=1) > 0)
    else:
        rank = np.broadcast_to(np.arange(index.shape[1]), index.shape)
    sizes = np.bincount(gy, minlength=int(max(y.max(), gy.max())) + 1)
    asked = sizes[y] - int(data["own"]) > 0
    return {k: float((hit & (rank < k)).any(axis=1)[asked].mean()) for k in data["ks"]}


def recall(data: dict[str, Any]) -> dict[int, float]:
    return retrieval.recall_at_k(
        data["q"], data["y"], data["ks"], **gallery_arguments(data)
    )


def all_metrics(data: dict[str, Any]) -> retrieval.RetrievalResult:
    return retrieval.evaluate_retrieval(
        data["q"], data["y"], data["ks"], **gallery_arguments(data)
    )


def top_k_10(data: dict[str, Any]) -> np.ndarray:
    return retrieval.top_k(data["q"], data["g"], 10, exclude_self=data["own"])[1]


def per_query(data: dict[str, Any]) -> retrieval.RetrievalResult:
    return retrieval.evaluate_retrieval(
        data["q"], data["y"], data["ks"], **gallery_arguments(data), per_query=True
    )


def held_1(data: dict[str, Any]) -> np.ndarray:
    """One query; the first repeat loads the gallery, and compiles."""
    if "held" not in data:
        data["held"] = retrieval.Gallery(data["g"])
    return data["held"].top_k(data["q"][:1], 10)[1]


def _faiss(data: dict[str, Any], k: int) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(data["g"])
    return index.search(data["q"], k)[1]


def faiss_10(data: dict[str, Any]) -> np.ndarray:
    return _faiss(data, 10 + int(data["own"]))


def faiss_k(data: dict[str, Any]) -> dict[int, float]:
    return recall_of_lists(_faiss(data, max(data["ks"]) + int(data["own"])), data)


def torch_blocks(data: dict[str, Any]) -> dict[int, float]:
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.from_numpy(data["g"]).to(device)
    q = torch.from_numpy(data["q"]).to(device)
    k = max(data["ks"]) + int(data["own"])
    index = [(x @ g.T).topk(k, dim=1).indices.cpu().numpy() for x in q.split(1000)]
    return recall_of_lists(np.concatenate(index), data)


def scikit(data: dict[str, Any]) -> dict[int, float]:
    from sklearn.neighbors import (  # pyright: ignore[reportMissingImports]
        NearestNeighbors,
    )

    k = max(data["ks"]) + int(data["own"])
    model = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(data["g"])
    return recall_of_lists(model.kneighbors(data["q"], return_distance=False), data)


def pml(data: dict[str, Any]) -> dict[str, float]:
    import torch  # pyright: ignore[reportMissingImports]
    from pytorch_metric_learning.utils.accuracy_calculator import (  # pyright: ignore[reportMissingImports]
        AccuracyCalculator,
    )

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
    )
    arguments = [torch.from_numpy(data[name]) for name in ("q", "y", "g", "gy")]
    return calculator.get_accuracy(*arguments, ref_includes_query=data["own"])


METHODS: dict[str, tuple[str | None, Callable[[dict[str, Any]], Any]]] = {
    "product": (None, product),
    "recall": (None, recall),
    "all_metrics": (None, all_metrics),
    "per_query": (None, per_query),
    "top_k_10": (None, top_k_10),
    "held_1": (None, held_1),
    "faiss_10": ("faiss", faiss_10),
    "faiss_k": ("faiss", faiss_k),
    "torch": ("torch", torch_blocks),
    "scikit": ("sklearn", scikit),
    "pml": ("pytorch_metric_learning", pml),
}


def agreement(name: str, answers: dict[str, Any], data: dict[str, Any]) -> str:
    """How a peer's answer compares with that of abe_jax."""
    answer = answers[name]
    if name == "faiss_10" and "top_k_10" in answers:
        ours = answers["top_k_10"]
        if data["own"]:
            other = answer != np.arange(len(answer))[:, None]
            answer = np.array([a[o][:10] for a, o in zip(answer, other, strict=True)])
        return f"{(answer == ours).mean():.6f} of the neighbours equal"
    if isinstance(answer, dict) and name == "pml" and "all_metrics" in answers:
        ours = answers["all_metrics"]
        pairs = (
            (ours.r_precision, answer["r_precision"]),
            (ours.map_at_r, answer["mean_average_precision_at_r"]),
            (ours.recall[1], answer["precision_at_1"]),
        )
        return f"differs by at most {max(abs(a - b) for a, b in pairs):.1e}"
    if isinstance(answer, dict) and "recall" in answers and name != "recall":
        ours = answers["recall"]
        apart = max(abs(ours[k] - answer[k]) for k in ours) * len(data["q"])
        return f"differs by at most {apart:.0f} hits"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact retrieval against its peers.")
    parser.add_argument("--shape", choices=SHAPES, default="sop")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows")
    parser.add_argument("--noise", type=float, default=2.6, help="within a class")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--methods", default=",".join(USUAL), help=f"all, or of {', '.join(METHODS)}"
    )
    args = parser.parse_args()
    names = list(METHODS) if args.methods == "all" else args.methods.split(",")
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"unknown methods {unknown}; choose from {list(METHODS)}")
    for name in list(names):
        package = METHODS[name][0]
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            names.remove(name)
    data = make_data(args.shape, args.scale, args.noise)
    print(f"{len(data['q'])} queries, {len(data['g'])} x {DIM}, {jax.devices()}")
    answers: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for _ in range(args.repeats):
        for name in names:
            call = METHODS[name][1]
            answers[name], seconds, peak = measure(lambda call=call: call(data))
            times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
            print(f"  {name} {seconds:.2f} s", flush=True)
    full = min(times["product"]) if times.get("product") else float("nan")
    print(f"{'method':12} {'seconds':>8} {'to product':>10} {'peak MiB':>9}  answer")
    for name in names:
        best = min(times[name])
        note = agreement(name, answers, data)
        if name == "recall":
            note = ", ".join(f"R@{k} {v:.4f}" for k, v in answers[name].items())
        print(f"{name:12} {best:8.2f} {best / full:10.2f} {peaks[name]:9.0f}  {note}")


if __name__ == "__main__":
    main()
