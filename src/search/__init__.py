"""Search in large indexes: faiss on this machine, Qdrant, clip-retrieval servers."""

from src.search.clip_retrieval import (
    PUBLISHED,
    PictureCache,
    RemoteIndex,
    fetch_images,
    first_found,
    is_public,
    sent_pictures,
)
from src.search.local import (
    KINDS,
    ROTATIONS,
    Embeddings,
    LocalIndex,
    build,
    choose,
    collect,
    embed,
    local_pictures,
    nearly_the_same,
    plans,
    write_tars,
)
from src.search.qdrant import QdrantIndex, parts_of

__all__ = [
    "Embeddings",
    "KINDS",
    "LocalIndex",
    "PUBLISHED",
    "PictureCache",
    "QdrantIndex",
    "ROTATIONS",
    "RemoteIndex",
    "build",
    "choose",
    "collect",
    "embed",
    "fetch_images",
    "first_found",
    "is_public",
    "local_pictures",
    "nearly_the_same",
    "parts_of",
    "plans",
    "sent_pictures",
    "write_tars",
]
