"""The data behind every task of the library: MovieLens or a simulated platform."""

from collections.abc import Mapping

from rankonce.datasets.domains.films import FILM_TASKS
from rankonce.datasets.domains.jobs import JOBS
from rankonce.datasets.domains.platform import Domain
from rankonce.datasets.domains.posts import POSTS
from rankonce.datasets.domains.products import PRODUCTS
from rankonce.datasets.domains.songs import SONGS
from rankonce.datasets.rating_examples import RATING_TASKS

SIMULATED: tuple[Domain, ...] = (JOBS, POSTS, PRODUCTS, SONGS)

# Where the examples of a task come from: the dataset "movielens" or a simulated domain.
TASK_SOURCES: Mapping[str, Domain | str] = {
    **dict.fromkeys((*RATING_TASKS, *FILM_TASKS), "movielens"),
    **{task: domain for domain in SIMULATED for task in domain.surfaces},
}
