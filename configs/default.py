"""Every field of a config, with its default. Other configs start from this one.

Fields marked (ours) are choices of this project: the paper does not give them, or they
do not exist there. Choose them with `data.validation_fraction` above 0, never on the
test classes. Override any field on the command line: `--config.train.steps=100`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Defaults: ABE-8^512 on a folder of images, as far as the paper says."""
    config = ConfigDict()
    config.seed = 0  # of weights, batches and augmentation

    config.model = model = ConfigDict()
    model.name = "abe"  # abe | m_heads | one_head: the paper's baselines
    # googlenet: BVLC's, with LRN, the paper's; googlenet_bn: with batch norm. Ours:
    # resnet50, vit_{small,base}_patch16, the same for weights of DINO, DeiT or MAE,
    # vit_{small,base}_patch16_dino, then vit_{small,base}_patch14_dinov2 and, with
    # registers, vit_{small,base}_patch14_reg4_dinov2.
    model.trunk = "googlenet"
    # File of the trunk's weights, or hf://OWNER/NAME on the hub, see docs/models.md; or
    # the workdir of another run.
    model.pretrained = placeholder(str)
    # all, or heads: all but S, which keeps the weights it starts from (ours).
    model.train = "all"
    model.freeze_batch_norm = False  # train with the running averages (ours)
    # Where S ends: pool3 (the paper's, and the default), pool2, 3a, 4a or 4b. Ours:
    # layer3 (the default) or layer2 of a ResNet, block6 (the default), or block1 to
    # block12, of a ViT.
    model.branch = placeholder(str)
    # ABE's alone: blocks behind S that the attention branch copies; by default 5 (the
    # paper's), the next layer of a ResNet, 2 of a ViT (ours).
    model.attention_blocks = placeholder(int)
    # Initial weights of ABE's masks, as a factor on Glorot's (ours): above 1 masks
    # start less alike.
    model.attention_spread = 1.0
    model.num_learners = 8  # M
    model.embedding_dim = 512  # D, of all learners together
    model.dtype = "float32"  # float32 | bfloat16: of the trunk's computation (ours)
    # Recompute blocks in the backward pass instead of keeping the activations
    # within (ours): less memory, more time; docs/performance.md has both.
    model.rematerialize = False
    # Run G for one learner at a time, and recompute it in the backward pass (ours): for
    # TPUs, whose on-chip memory holds one learner's maps; docs/scaling.md has both.
    model.learners_in_turn = False
    model.width = 1.0  # factor on the trunk's channels; 1 is the paper's

    config.loss = loss = ConfigDict()
    # Of each learner. contrastive: the paper's; multi_similarity | proxy_anchor.
    loss.name = "contrastive"
    loss.margin = 1.0  # m_c of contrastive, of squared distances
    loss.divergence_margin = 1.0  # m_div
    loss.divergence_weight = 1.0  # lambda_div
    # mean: L_div is divided by the batch size (ours); sum: as the paper prints it.
    loss.divergence_reduction = "mean"
    # alpha, beta, epsilon: of Wang et al., CVPR 2019. base (their lambda): the default
    # of pytorch-metric-learning, which says that the paper uses 1.
    loss.multi_similarity = ConfigDict(
        {"alpha": 2.0, "beta": 50.0, "base": 0.5, "epsilon": 0.1}
    )
    # Those of Kim et al., CVPR 2020; margin is their delta. See train.loss_factor.
    loss.proxy_anchor = ConfigDict({"margin": 0.1, "alpha": 32.0})

    config.data = data = ConfigDict()
    # image_folder | birds (generated) | cub200 | cars196 | sop | inshop (prepared)
    data.name = "image_folder"
    # Folder or zip file with one folder a class, or the --data_dir of abe_jax.prepare.
    data.path = placeholder(str)
    data.load_size = 256  # side of the squares that the host delivers (paper)
    # How an image becomes that square. pad: its long side is load_size, and the rest is
    # the mean colour (the paper's way; the colour is ours); centre: its short side is
    # load_size, and the middle is kept; squeeze: all of it, its aspect lost.
    data.square = "pad"
    data.box_crop = False  # only the object's box: cub200, cars196, inshop
    # Side of the crops that the model sees; for a ViT a multiple of its patches' side.
    data.image_size = 224
    data.sampler = "pairs"  # pairs: the paper's; classes: P classes x K images
    data.images_per_class = 4  # K, for sampler = "classes"
    data.validation_fraction = 0.0  # share of the training classes held out (ours)
    data.in_memory = False  # decode each image once and keep it, without workers
    # Folder that keeps S's outputs, computed once; for model.train = heads (ours). With
    # several processes each first writes a copy of all: it needs room for these copies.
    data.feature_cache = placeholder(str)
    data.num_threads = 4  # decoding threads, where there are no workers
    data.num_workers = 0  # decoding processes
    data.birds_classes = 128  # species of generated birds, and images of each
    data.birds_images_per_class = 24

    # All but crop and flip (ours). Probabilities are 0 to 1; 0 switches a change off.
    config.augment = augment = ConfigDict()
    # plain: image_size pixels anywhere in the square (paper); area: a part of the
    # square, resized; centre: its middle, as in evaluation.
    augment.crop = "plain"
    augment.crop_area = (0.3, 1.0)  # of crop = area: of the image; above 1 zooms out
    augment.crop_aspect = 1.33  # of crop = area: widest width over height
    augment.flip = 0.5  # probability of a left-right flip
    augment.brightness = 0.0  # reach of the offset, 1 is the whole range
    augment.contrast = 0.0  # reach of the factor around 1
    augment.saturation = 0.0  # reach of the factor around 1
    augment.hue = 0.0  # reach of the turn, 1 is half the colour circle
    augment.grey = 0.0  # probability of no colour
    augment.erase = 0.0  # probability of a covered rectangle

    config.train = train = ConfigDict()
    train.steps = 10_000  # (ours)
    train.batch_size = 64  # images of the global batch
    train.optimizer = "sgd"  # sgd | adamw
    train.learning_rate = 1e-3  # peak (ours)
    train.momentum = 0.9  # of sgd
    train.weight_decay = 1e-4  # of kernels (ours)
    train.schedule = "cosine"  # cosine | step | constant (ours)
    train.warmup_steps = 0  # linear, from 1 / warmup_steps of the peak (ours)
    train.decay_every = 5_000  # steps, of schedule = "step" (ours)
    train.decay_rate = 0.1  # of schedule = "step" (ours)
    train.clip_norm = 0.0  # global norm of the gradient; 0: no clipping (ours)
    # Factors on the learning rate (ours): of the layers that no published network has
    # (attention's last, the heads), and of a loss's proxies (their authors: 100).
    train.new_layer_factor = 1.0
    train.loss_factor = 1.0
    train.chunks = 1  # embed a device's images in so many parts, to save memory (ours)
    train.log_every = 50  # steps between lines of metrics
    train.eval_every = 1_000  # steps between evaluations; also before and after all
    train.checkpoint_every = 1_000  # steps between checkpoints; also at the end
    train.keep_checkpoints = 2  # the newest that stay
    train.profile_steps = 0  # trace so many, for XProf, into the workdir
    train.trackers = ()  # also log to "wandb", "mlflow", which are to be installed

    config.eval = evaluation = ConfigDict()
    evaluation.batch_size = 64  # images that a device embeds at once
    evaluation.recall_at = (1, 2, 4, 8)  # K of Recall@K

    config.parallel = parallel = ConfigDict()
    parallel.mapping = "shard_map"  # shard_map | pmap: spreads the step over devices
    return config
