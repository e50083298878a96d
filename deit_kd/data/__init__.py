"""From photos to batches: datasets, loaders, the order of an epoch, and mixing."""

from deit_kd.data.cache import CAN_SHARE, CHANNELS, Decoded
from deit_kd.data.decode import UnreadableImage, load_image
from deit_kd.data.decoders import PILLOW, decoder_named
from deit_kd.data.device_loader import DeviceLoader, Draws
from deit_kd.data.folder import folders_above_classes, index_tree
from deit_kd.data.folds import joined
from deit_kd.data.loader import PillowLoader, TrainingLoader, Views, build_evaluation_loader, lost_worker
from deit_kd.data.mixing import Mixing
from deit_kd.data.order import TrainingBatchSampler
from deit_kd.data.photos import Photos, Splits
from deit_kd.data.sets import build_splits, one_split, unread_note
from deit_kd.data.shard_sets import index_shards
from deit_kd.data.sharing import PREFETCHED, batches_ahead
from deit_kd.data.subsets import share_of, with_classes

__all__ = [
    "CAN_SHARE",
    "CHANNELS",
    "PILLOW",
    "PREFETCHED",
    "Decoded",
    "DeviceLoader",
    "Draws",
    "Mixing",
    "Photos",
    "PillowLoader",
    "Splits",
    "TrainingBatchSampler",
    "TrainingLoader",
    "UnreadableImage",
    "Views",
    "batches_ahead",
    "build_evaluation_loader",
    "build_splits",
    "decoder_named",
    "folders_above_classes",
    "index_shards",
    "index_tree",
    "joined",
    "load_image",
    "lost_worker",
    "one_split",
    "share_of",
    "unread_note",
    "with_classes",
]
