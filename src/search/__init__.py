"""Search in large indexes: faiss on this machine, Qdrant, clip-retrieval servers.

faiss and Qdrant are packages of the extra `search`; they are imported when an index is opened.
"""

from src.search.building import OPQ_ITERATIONS, build_index, merge_shards
from src.search.clip_retrieval import PUBLISHED_OPTIONS, RemoteIndex, RequestOptions
from src.search.embed import embed_images
from src.search.embeddings import Embeddings, SearchResult, find_near_duplicates, select_top_k
from src.search.fetching import (
    FetchedImages,
    FetchOptions,
    ImageCache,
    decode_sent_images,
    fetch_images,
    select_available_images,
)
from src.search.http_client import is_public
from src.search.images import decode_image, find_new_parts, load_local_images, write_tars
from src.search.local import LocalIndex
from src.search.plans import INDEX_KINDS, IndexPlan, choose_index, list_index_plans
from src.search.qdrant import QdrantIndex, iterate_parts
from src.search.records import find_foreign_index, needs_building
from src.search.results import (
    check_neighbours,
    check_pictures,
    describe_encoder,
    find_picture_source,
)
from src.search.tables import make_storable

__all__ = [
    "Embeddings",
    "FetchOptions",
    "FetchedImages",
    "INDEX_KINDS",
    "ImageCache",
    "IndexPlan",
    "LocalIndex",
    "OPQ_ITERATIONS",
    "PUBLISHED_OPTIONS",
    "QdrantIndex",
    "RemoteIndex",
    "RequestOptions",
    "SearchResult",
    "build_index",
    "check_neighbours",
    "check_pictures",
    "choose_index",
    "decode_image",
    "decode_sent_images",
    "describe_encoder",
    "embed_images",
    "fetch_images",
    "find_foreign_index",
    "find_near_duplicates",
    "find_new_parts",
    "find_picture_source",
    "is_public",
    "iterate_parts",
    "list_index_plans",
    "load_local_images",
    "make_storable",
    "merge_shards",
    "needs_building",
    "select_available_images",
    "select_top_k",
    "write_tars",
]
