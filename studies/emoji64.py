"""Makes the drawings that `configs/emoji64.py` is for: a class an emoji.

    pip install resvg-py
    python -m studies.emoji64 --output=emoji64

The artwork comes through `npm pack` (Node.js) from nine artists' packages, in pinned
versions; it takes two minutes. Of 1,364 emoji that four or more of them draw there are
9,758 images, 64 x 64 pixels on white, `OUTPUT/CODE POINTS/STYLE.png`. Flags, and emoji
that differ from others in a detail only (hair, gender, the hour of a clock), are left
out. `OUTPUT.csv` has each class's group and name.

Licences, as the packages state them; whoever passes images on must name the artists:

    noto, noto-v1   Apache-2.0     Google, Noto Emoji (googlefonts/noto-emoji)
    twemoji         CC-BY-4.0      Twitter and contributors (jdecked/twemoji)
    openmoji        CC-BY-SA-4.0   OpenMoji (hfg-gmuend/openmoji)
    fluent-flat     MIT            Microsoft, Fluent Emoji (microsoft/fluentui-emoji)
    emojione        CC-BY-4.0      EmojiTwo (EmojiTwo/emojitwo)
    emojione-v1     CC-BY-SA-4.0   Emoji One 1.5 (joypixels/emojione-legacy)
    fxemoji         CC-BY-4.0      Mozilla, Firefox OS Emoji (mozilla/fxemoji)
    streamline      CC-BY-4.0      Streamline Emojis (webalys-hq/streamline-vectors)

Names and groups: unicode-emoji-json (MIT), from Unicode's data.
"""

import csv
import io
import json
import pathlib
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

_OUTPUT = flags.DEFINE_string("output", "emoji64", "Image folder to write.")
_SIZE = flags.DEFINE_integer("size", 64, "Side of the images, pixels.", lower_bound=1)

_MIN_STYLES = 4  # the fewest drawings of a class
_NAMES = "unicode-emoji-json@0.9.0"
# In order of preference: of two equal drawings of a class the first one is kept.
_STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "streamline": "@iconify-json/streamline-emojis@1.2.4",
}
# Icons whose name means another emoji to Unicode, or none ("-"), and broken drawings.
_FIXES = {
    "streamline": "turkey:-",
    "emojione": "keycap-pound:0023-20e3",
    "noto-v1": "keycap-pound:0023-20e3",
    "emojione-v1": "keycap-pound:0023-20e3 keyboard:- window:-",
    "fxemoji": """
2hearts:1f495 acorn:1f330 americasglobe:1f30e anguish:1f627
anticlockwiseupwardsanddownwardsarrows:1f504 aok:1f44c arrowrightwardsdownwards:2935
arrowrightwardsupwards:2934 asiaaustraliaglobe:1f30f backwithleftwardsarrow:1f519
ballottboxwithballott:1f5f3 banknotedollar:1f4b5 banknoteeuro:1f4b6
banknotepound:1f4b7 banknoteyen:1f4b4 beachumbrella:1f3d6 bellcancellation:1f515
blackdownpointingdoublearrow:23ec blackleftpointingarrow:25c0
blackleftpointingdoublearrow:23ea blackquestionmark:2753 blackrightpointingarrow:25b6
blackrightpointingdoublearrow:23e9 blackuppointingdoublearrow:23eb blackwaving:1f3f4
blonde:1f471 bolt:26a1 bookmarktab:1f4d1 boot:1f462 bow:1f380 bowing:1f647 bride:1f470
bunny:1f430 bunnyside:1f407 cat:1f431 catside:1f408 cellphone:1f4f1
chartdownwardstrend:1f4c9 chartupwardstrend:1f4c8 chartupwardstrendyen:1f4b9
chilipepper:1f336 chineseflag:1f1e8-1f1f3 clap:1f44f clock12oclock:1f55b
clock12thirty:1f567 clock1oclock:1f550 clock1thirty:1f55c clock2oclock:1f551
clock2thirty:1f55d clock3oclock:1f552 clock3thirty:1f55e clock4oclock:1f553
clock4thirty:1f55f clock5thirty:1f560 clock6oclock:1f555 clock6thirty:1f561
clock7oclock:1f556 clockwisedownupcircledarrows:1f503
clockwiserightwardsleftwardscirclearrows:1f501
clockwiserightwardsleftwardscirclearrowsone:1f502 closedmailboxlowered:1f4ea
closedmailboxraised:1f4eb coldsweat:1f630 confetti:1f38a construct:1f477
construction:1f3d7 contact2:1f465 contact:1f464 controlknob:1f39b cop:1f46e
couple:1f491 couplekiss:1f48f devilhorns:1f608 diamondshapewithdotinside:1f4a0
dissapointedrelief:1f625 dog:1f436 dogside:1f415 doubleexclaimationmark:203c
down:1f447 downpointingsmallredtrisngle:1f53d dragonhead:1f432 dragonside:1f409
eightspokedasterix:2733 endwithleftwardsarrow:1f51a envelopedownarrowabove:1f4e9
europeafricaglobe:1f30d evergreen:1f332 exclaimationquestionmark:2049
fallingleaf:1f342 fishcakeswirl:1f365 flexbicep:1f4aa floppydisk2:1f4be
forkknife:1f37d foxcrying:1f63f foxgrin:1f638 foxheart:1f63b foxkissing:1f63d
foxpouting:1f63e foxsmiling:1f63a foxtearofjoy:1f639 foxweary:1f640 foxwry:1f63c
franceflag:1f1eb-1f1f7 frontfacingchick:1f425 frown:1f64d frownmouth:1f626 gem:1f48e
girlgirl:1f46d girlguy:1f46b gma:1f475 gpa:1f474 greatbritainflag:1f1ec-1f1e7
grin:1f600 grineyes:1f601 grinsquint:1f606 grinsweat:1f605 grintears:1f602
grinwide:1f603 grinwideeyes:1f604 guapimao:1f472 guyguy:1f46c halo:1f607
hampster:1f439 hand:270b handheldvideocamera:1f4f9 hands:1f450 handup:1f64b
headmassage:1f486 heartarrow:1f498 heartblue:- hearteyes:1f60d heartgreen:1f49a
heartpurple:1f49c heartribbon:1f49d heartyellow:1f49b heavyexclaimationmarksymbol:2757
heavymultiplicationsymbol:2716 heels:1f460 high5:1f64c highspeedtrainbulletnose:1f685
hourglassflowingsand:23f3 index:261d italianflag:1f1ee-1f1f9 japaneseangrymask:1f47a
japanflag:1f1ef-1f1f5 keyboard:- kiss:1f617 kissclosedeyes:1f61a kisseyes:1f619
kissing:1f618 koreaflag:1f1f0-1f1f7 leaffluttering:1f343 left:1f448
leftmagnifyingglass:1f50d leopardside:1f406 lockandkey:1f510 lowerleftpen:1f58a
mahjong:1f004 makeupbag:1f45d manltepiececlock:1f570 mansshirt:1f455 medicalmask:1f637
mensrunner:1f45f mensshoe:1f45e meridianglobe:1f310 monkeyhear:1f649 monkeysee:1f648
monkeyspeak:1f64a mouse:1f42d mouseside:1f401 negativesquaredlatincaptiala:1f170
negativesquaredlatincaptialb:1f171 negativesquaredlatincaptialo:1f17e nogesture:1f645
nomouth:1f636 nooneunder18symbol:1f51e notebookdecorativecover:1f4d4 okgesture:1f646
onarrowleftright:1f51b openmailboxlowered:1f4ed openmailboxraised:1f4ec
openmouth:1f62e outbox:1f4e4 perservere:1f623 phonerightarrowleft:1f4f2 pig:1f437
pigside:1f416 pigsnout:1f43d pinkwallet:1f45b poo:1f4a9 potablewatersystem:1f6b0
pout:1f64e pray:1f64f present:1f381 racecar:1f3ce raincloud:1f327
raisedhandpartfingers:1f596 raisedhandsfingerssplayed:1f590 reminder:1f397
reversehandmiddlefinger:1f595 right:1f449 rightmagnifyingglass:1f50e running:1f3c3
russianflag:1f1f7-1f1fa saggitarius:2650 sandals:1f461 screamfear:1f631
silhouetteohjapan:1f5fe sixpointedstarwithdot:1f52f sleuthspy:1f575 smallfrown:1f641
smallsmile:1f642 smileeyes:1f60a smiletongue:1f60b smirk:1f60f snowcloud:1f328
snowmountains:1f3d4 soonwithrightarrow:1f51c spanishflag:1f1ea-1f1f8 sparkle:-
speaker3soundwaves:1f50a speakercancellation:1f507 speakeronesoundwave:1f509
speechbubble:1f4ac spurtingwhale:1f433 squaredup:1f199 star:1f31f stormcloud:1f329
studiomic:1f399 sunglasses:1f60e sunraincloud:1f326 sunrays:2600 sweat:1f613
sweatsplash:1f4a6 swimming:1f3ca telephonereceiver2:1f4de ten:1f51f tennisball:1f3be
thoughtbaloon:1f4ad tie:1f454 tiger:1f42f tigerside:1f405 tongueout:1f61b
tongueoutwink2:1f61d tongueoutwink:1f61c topwithupwardsarrow:1f51d toykotower:1f5fc
tramcar:- triumph:1f624 turban:1f473 umbrella:1f302 up:1f446
uppointingsmallredtrisngle:1f53c videocasette:1f4fc waitress:1f481 walking:1f6b6
waningbibbousmoon:1f316 wave:1f30a waving:1f44b whiteexclaimationmark:2755
whitesunsmallcloud:1f324 window:- womansshirt:1f45a
""",
}

Json = dict[str, Any]


def unpack(package: str) -> Json:
    """The JSON files of an npm package, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with tarfile.open(next(pathlib.Path(folder).glob("*.tgz"))) as archive:
            return {
                pathlib.Path(member.name).name: json.load(content)
                for member in archive
                if member.name.endswith(".json")
                and (content := archive.extractfile(member)) is not None
            }


def squash(name: str) -> str:
    """A name reduced to ASCII letters and digits, to compare names by."""
    for sign, word in (("*", "asterisk"), ("#", "hash"), ("&", "and")):
        name = name.replace(sign, word)
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def class_of(code_points: str) -> str:
    """Hexadecimal code points joined by "-", without the one that asks for colour."""
    return "-".join(c for c in code_points.lower().split("-") if c != "fe0f")


def names_of_classes(emoji: Json, sets: Json) -> dict[str, str]:
    """Squashed name to class: Unicode's names, the sets' tables, then characters'."""
    index: dict[str, str] = {}
    for name, info in emoji.items():
        index.setdefault(squash(info["name"]), name)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for files in sets.values():
        aliases = defaultdict(list)
        for alias, entry in files["icons.json"].get("aliases", {}).items():
            aliases[entry["parent"]].append(alias)
        for code_points, icon in files.get("chars.json", {}).items():
            if (found := class_of(code_points)) in emoji:
                for name in (icon, *aliases[icon]):
                    votes[squash(name)][found] += 1
    for name, vote in votes.items():
        index.setdefault(name, vote.most_common(1)[0][0])
    single = {
        c: squash(unicodedata.name(chr(int(c, 16)), "")) for c in emoji if "-" not in c
    }
    for found, name in single.items():
        index.setdefault(name, found)
    for found, name in single.items():
        short = re.sub("(sign|symbol|face|mark)$|^(heavy|black|white)", "", name)
        index.setdefault(short, found)
    return index


def icons_of_classes(
    style: str, sets: Json, emoji: Json, index: dict[str, str]
) -> dict[str, str]:
    """Class to icon of one set: by its table of characters, or else by name."""
    icons = sets[style]["icons.json"]["icons"]
    table = sets[style].get("chars.json")
    pairs: list[tuple[str | None, str]] = []
    if table:
        pairs += [(class_of(c), icon) for c, icon in table.items() if icon in icons]
    else:
        fixes = dict(pair.split(":") for pair in _FIXES.get(style, "").split())
        for icon in icons:
            plain = re.sub("^flag-for-(flag-)?", "flag-", icon)
            if style == "streamline":  # several drawings of one emoji are numbered
                plain = re.sub("-1$", "", plain)
            pairs.append((fixes.get(icon) or index.get(squash(plain)), icon))
    found: dict[str, str] = {}
    for name, icon in pairs:
        if name in emoji:
            found.setdefault(name, icon)
    return found


def render(icons: Json, name: str, size: int) -> Image.Image:
    """One icon as an RGB image of `size` x `size` pixels, centred on white."""
    import resvg_py  # pyright: ignore[reportMissingImports]

    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )
    scale = 2 * size / max(width, height)
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=round(width * scale), height=round(height * scale)
    )
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", (2 * size, 2 * size), "white")
    margins = (2 * size - drawing.width) // 2, (2 * size - drawing.height) // 2
    page.alpha_composite(drawing, margins)
    return page.convert("RGB").resize((size, size), Image.Resampling.BOX)


def draw_style(
    style: str, sets: Json, emoji: Json, index: dict[str, str], size: int
) -> dict[str, np.ndarray]:
    """Class to image in one style, without blanks and repeats among classes."""
    icons = icons_of_classes(style, sets, emoji, index)
    order = {name: number for number, name in enumerate(emoji)}
    images, seen = {}, set()
    for name in sorted(icons, key=lambda c: (c.count("-"), order[c])):
        image = np.asarray(render(sets[style]["icons.json"], icons[name], size))
        if image.std() >= 4 and image.tobytes() not in seen:
            seen.add(image.tobytes())
            images[name] = image
    return images


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """But for rounding: the mean difference is below one grey level."""
    return bool(np.abs(a.astype(np.int16) - b).mean() < 1)


def is_left_out(name: str, group: str) -> bool:
    """Whether a class is a flag, or one of near-twins.

    Those are people joined with a gender, hair, direction or family (their plain person
    is not), keycaps and clock faces.
    """
    return (
        group == "Flags"
        or (group == "People & Body" and "200d" in name)
        or "20e3" in name
        or 0x1F550 <= int(name.split("-")[0], 16) <= 0x1F567
    )


def main(_: Any) -> None:
    output, size = pathlib.Path(_OUTPUT.value), _SIZE.value
    output.mkdir(parents=True)  # a folder that is there already is an error
    emoji = {
        "-".join(f"{ord(c):04x}" for c in character if c != "\ufe0f"): info
        for character, info in unpack(_NAMES)["data-by-emoji.json"].items()
    }
    sets = {style: unpack(package) for style, package in _STYLES.items()}
    index = names_of_classes(emoji, sets)
    classes: dict[str, dict[str, np.ndarray]] = {name: {} for name in emoji}
    for style in _STYLES:
        for name, image in draw_style(style, sets, emoji, index, size).items():
            if not any(_equal(image, other) for other in classes[name].values()):
                classes[name][style] = image
        print(f"{style}: {sum(style in drawn for drawn in classes.values())} drawings")
    classes = {
        name: drawn
        for name, drawn in classes.items()
        if len(drawn) >= _MIN_STYLES and not is_left_out(name, emoji[name]["group"])
    }
    for name, drawn in classes.items():
        (output / name).mkdir()
        for style, image in drawn.items():
            Image.fromarray(image).save(output / name / f"{style}.png", optimize=True)
    with output.with_name(f"{output.name}.csv").open("w", newline="") as file:
        rows = [(name, emoji[name]["group"], emoji[name]["name"]) for name in classes]
        csv.writer(file).writerows([("class", "group", "name"), *rows])
    images = sum(map(len, classes.values()))
    print(f"{len(classes):,} classes, {images:,} images in {output}")


if __name__ == "__main__":
    app.run(main)
