"""Search in large indexes: faiss on this machine, Qdrant, clip-retrieval servers."""

from src.search.clip_retrieval import (
    PUBLISHED_SETTINGS,
    ImageCache,
    RemoteIndex,
    decode_sent_images,
    fetch_images,
    is_public,
    select_available_images,
)
from src.search.local import (
    INDEX_KINDS,
    OPQ_ITERATIONS,
    Embeddings,
    LocalIndex,
    build_index,
    choose_index,
    embed_images,
    find_near_duplicates,
    find_new_parts,
    list_index_plans,
    load_local_images,
    write_tars,
)
from src.search.qdrant import QdrantIndex, iterate_parts

__all__ = [
    "Embeddings",
    "INDEX_KINDS",
    "LocalIndex",
    "PUBLISHED_SETTINGS",
    "ImageCache",
    "QdrantIndex",
    "OPQ_ITERATIONS",
    "RemoteIndex",
    "build_index",
    "choose_index",
    "find_new_parts",
    "embed_images",
    "fetch_images",
    "select_available_images",
    "is_public",
    "load_local_images",
    "find_near_duplicates",
    "iterate_parts",
    "list_index_plans",
    "decode_sent_images",
    "write_tars",
]
