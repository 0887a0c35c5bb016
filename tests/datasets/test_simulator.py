"""Simulated platforms: the past alone is told, the truth is what was planted and can be learnt.

And films: the tasks made of MovieLens files keep to the past as well.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rankonce.cli.tasks import example_request
from rankonce.datasets.domains import SIMULATED, TASK_SOURCES
from rankonce.datasets.domains.films import FILM_TASKS, film_examples, film_examples_by_member
from rankonce.datasets.domains.platform import (
    Domain,
    Platform,
    SimulatedExample,
    build_platform,
)
from rankonce.datasets.domains.posts import POSTS
from rankonce.datasets.domains.songs import SONGS, SongsConfig
from rankonce.datasets.rating_examples import RATING_TASKS
from rankonce.datasets.simulator import (
    Scene,
    SimulatorConfig,
    World,
    act,
    build_world,
    draw_items,
    draw_requests,
    label_probabilities,
    simulate_log,
    yes_or_no,
)
from rankonce.errors import DataError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.rendering import Renderer
from rankonce.prompts.tasks import Task, library_tasks
from rankonce.records import TrainingExample, read_request
from tests.conftest import build_tokenizer

SIMULATED_TASKS = [(domain, task) for domain in SIMULATED for task in domain.surfaces]
by_task = pytest.mark.parametrize(
    ("domain", "task"), SIMULATED_TASKS, ids=[task for _, task in SIMULATED_TASKS]
)
by_domain = pytest.mark.parametrize("domain", SIMULATED, ids=lambda domain: domain.name)
FILM_NAMES = [*RATING_TASKS, *FILM_TASKS]


def small(domain: Domain, **changes: Any) -> SimulatorConfig:
    return replace(domain.config(), num_members=80, num_items=160, num_requests=300, **changes)


@cache
def platform_of(name: str, seed: int = 0) -> Platform:
    (domain,) = (domain for domain in SIMULATED if domain.name == name)
    return build_platform(domain, small(domain, seed=seed))


@cache
def examples_of(name: str, task: str) -> list[SimulatedExample]:
    return list(platform_of(name).examples(task, 120))


def auc(labels: Any, scores: Any) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


# The library and its sources


def test_every_task_of_the_library_has_data_behind_it() -> None:
    assert set(TASK_SOURCES) == set(library_tasks())
    assert len(library_tasks()) >= 30
    for task, source in TASK_SOURCES.items():
        assert source == "movielens" or (isinstance(source, Domain) and task in source.surfaces)


def test_every_domain_has_six_tasks() -> None:
    names = [source if isinstance(source, str) else source.name for source in TASK_SOURCES.values()]
    assert set(names) == {"movielens", "jobs", "feed", "shopping", "music"}
    assert min(names.count(name) for name in names) >= 6


def check_against_task(task: Task, examples: Sequence[TrainingExample]) -> None:
    """Render examples; together they fill every field and use every action and label."""
    renderer = Renderer(TextEncoder(build_tokenizer()), max_prompt_tokens=16_384)
    filled: dict[str, set[str]] = {"profile": set(), "candidate": set(), "history": set()}
    actions, labels = set(), set()
    for example in examples:
        request = read_request(example.request)
        assert request.task == task.name
        filled["profile"] |= set(request.profile)
        filled["candidate"] |= {name for item in request.candidates for name in item.fields}
        filled["history"] |= {name for event in request.history for name in event.item.fields}
        actions |= {event.action for event in request.history}
        labels |= set(example.labels)
    for example in examples[:: max(1, len(examples) // 20)]:
        renderer.render(task, example.request)
    # Two tasks of search and similar items also take what not every source has.
    optional = {"query", "country"} if task.name == "similar-item" else set()
    evidence: set[str] = set()
    if task.name == "search-relevance":
        # What a search engine knows is of a collection, which a simulated shop is not.
        evidence = set(task.candidate.fields) - {"title", "text"}
    assert filled["profile"] == set(task.profile.fields) - optional
    assert filled["candidate"] == set(task.candidate.fields) - evidence
    if task.history is not None:
        assert filled["history"] == set(task.history.fields)
        # Rows of films tell dislikes in numbers; other callers may have them as events.
        untold = {"disliked"} if task.name == "movie-like" else set()
        assert actions == set(task.history.actions) - untold or not task.history.actions
    assert labels == set(task.label_names)


@by_task
def test_a_simulated_task_fills_every_field_action_and_label(domain: Domain, task: str) -> None:
    examples = [simulated.example for simulated in examples_of(domain.name, task)]
    check_against_task(library_tasks()[task], examples)


@by_task
def test_the_truth_stands_beside_every_label(domain: Domain, task: str) -> None:
    for simulated in examples_of(domain.name, task):
        assert len(simulated.truth) == len(simulated.example.labels)
        for shares in simulated.truth:
            assert tuple(shares) == library_tasks()[task].label_names
            assert sum(shares.values()) == pytest.approx(1)
            assert min(shares.values()) > 0


# The same rows, and the past alone


@by_task
def test_a_seed_gives_the_same_rows_and_another_seed_others(domain: Domain, task: str) -> None:
    first = examples_of(domain.name, task)
    again = list(build_platform(domain, small(domain)).examples(task, 120))
    other = list(platform_of(domain.name, seed=1).examples(task, 120))
    assert again == first
    assert [s.example.labels for s in other] != [s.example.labels for s in first]


def with_another_future(platform: Platform, cut: int) -> Platform:
    """Replace who is shown what from a moment on, and what happens, and rewrite later items."""
    random = np.random.default_rng(5)
    scene, log, world = platform.log.scene, platform.log, platform.world
    later = scene.times_R >= cut
    # Other totals, not the same ones in another order: a sum over all time would not notice.
    members = np.where(later, random.integers(0, 5, len(later)), scene.members_R)
    items = np.where(
        later[:, None],
        random.permuted(np.tile(np.arange(20), (len(later), 1)), axis=1)[:, :10],
        scene.candidates_RC,
    )
    turned = np.where(later[:, None], 0, log.labels_RC)
    unknown = np.flatnonzero(world.released_N >= cut)
    shuffled = np.arange(len(world.released_N))
    shuffled[unknown] = random.permutation(unknown)
    return Platform(
        platform.domain,
        replace(world, values={name: codes[shuffled] for name, codes in world.values.items()}),
        replace(
            log,
            scene=replace(scene, members_R=members, candidates_RC=items),
            labels_RC=turned,
        ),
    )


@by_task
def test_no_feature_sees_the_future(domain: Domain, task: str) -> None:
    platform = platform_of(domain.name)
    config = platform.world.config
    cut = config.start + config.days * 86_400 // 2
    changed = with_another_future(platform, cut)
    assert not np.array_equal(changed.log.labels_RC, platform.log.labels_RC)
    surface = domain.surfaces[task]
    if surface.draw is not None:
        # The surface asks the same; only what the log and the items say may differ.
        impressions = platform.impressions(task, 120)
        changed = _with_impressions(changed, impressions)
    before = [
        simulated.example.request
        for simulated in examples_of(domain.name, task)
        if (simulated.example.request.time or 0) < cut
    ]
    assert len(before) > 20
    after = [simulated.example.request for simulated in changed.examples(task, 120)]
    assert before == after[: len(before)]
    # A recruiter's page says nothing that the log tells.
    if task != "job-outreach":
        assert after != [s.example.request for s in examples_of(domain.name, task)]


def _with_impressions(platform: Platform, impressions: Any) -> Platform:
    class Given(Platform):
        def impressions(self, task: str, count: int) -> Any:
            return impressions

    return Given(platform.domain, platform.world, platform.log)


@by_domain
def test_histories_hold_what_the_member_did_strictly_before(domain: Domain) -> None:
    platform = platform_of(domain.name)
    for task in domain.surfaces:
        for simulated in examples_of(domain.name, task):
            request = simulated.example.request
            times = [event.time for event in request.history]
            assert times == sorted(times)
            assert all(time < (request.time or 0) for time in times)
            if simulated.cold_member:
                assert not times
    assert platform.log.scene.times_R.tolist() == sorted(platform.log.scene.times_R.tolist())


# Cold starts and the split


@by_domain
def test_nobody_comes_and_nothing_is_shown_before_it_is_there(domain: Domain) -> None:
    world, scene = platform_of(domain.name).world, platform_of(domain.name).log.scene
    assert (world.joined_M[scene.members_R] <= scene.times_R).all()
    assert (world.released_N[scene.candidates_RC] <= scene.times_R[:, None]).all()
    assert all(len(set(row)) == len(row) for row in scene.candidates_RC.tolist())


@pytest.mark.parametrize("task", ["job-apply", "post-reaction", "song-like"])
def test_cold_members_and_items_are_marked(task: str) -> None:
    source = TASK_SOURCES[task]
    assert isinstance(source, Domain)
    scene = platform_of(source.name).log.scene
    first_seen: dict[int, int] = {}
    members: set[int] = set()
    for row, simulated in enumerate(examples_of(source.name, task)):
        time, items = int(scene.times_R[row]), scene.candidates_RC[row].tolist()
        assert simulated.member == int(scene.members_R[row])
        assert simulated.cold_member == (int(scene.members_R[row]) not in members)
        assert simulated.cold_candidates == tuple(
            first_seen.get(item, time) >= time for item in items
        )
        members.add(int(scene.members_R[row]))
        for item in items:
            first_seen.setdefault(item, time)


@pytest.mark.parametrize("task", ["job-newcomer", "post-newcomer", "song-newcomer"])
def test_a_newcomer_is_cold(task: str) -> None:
    source = TASK_SOURCES[task]
    assert isinstance(source, Domain)
    assert all(simulated.cold_member for simulated in examples_of(source.name, task))


@pytest.mark.parametrize(
    ("task", "usual_task"),
    [
        ("job-opening", "job-dismiss"),
        ("post-fresh", "post-like"),
        ("product-launch", "product-rating"),
        ("song-release", "song-finish"),
    ],
)
def test_new_items_are_cold_far_more_often_than_others(task: str, usual_task: str) -> None:
    source = TASK_SOURCES[task]
    assert isinstance(source, Domain)
    new, usual = (
        np.mean([cold for s in examples_of(source.name, name) for cold in s.cold_candidates])
        for name in (task, usual_task)
    )
    assert new > 2 * usual


@by_domain
def test_the_split_follows_the_time(domain: Domain) -> None:
    task = next(iter(domain.surfaces))
    parts = [simulated.split for simulated in examples_of(domain.name, task)]
    assert parts == sorted(parts, key=["train", "valid", "test"].index)
    assert set(parts) == {"train", "valid", "test"}


def test_more_candidates_than_items_are_refused() -> None:
    with pytest.raises(DataError, match="candidates_per_request: should be from 1 to 7"):
        SongsConfig(num_items=10, candidates_per_request=8)


# What is planted is there


def shown(config: SimulatorConfig, count: int = 3000) -> tuple[World, Scene, np.ndarray]:
    """Impressions of a yes-or-no surface: world, scene, and 1 for Yes."""
    world = build_world(config)
    members, times = draw_requests(world, "test", count)
    items = draw_items(world, "test", times)
    scene = Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=world.item_utility(members, times, items),
    )
    return world, scene, act(world, "test", scene, yes_or_no(0.0)).labels_RC == 0


def test_the_planted_position_effect_is_in_the_labels() -> None:
    plain = {"popularity_effect": 0.0, "freshness_effect": 0.0}
    *_, biased = shown(SongsConfig(position_effect=1.0, **plain))
    *_, flat = shown(SongsConfig(position_effect=0.0, **plain))
    by_position = biased.mean(axis=0)
    assert by_position[0] - by_position[9] > 0.3
    assert np.all(np.diff(by_position) < 0.02)
    assert np.ptp(flat.mean(axis=0)) < 0.06


def test_the_planted_popularity_effect_is_in_the_labels() -> None:
    for effect, least, most in ((1.0, 0.25, 1.0), (0.0, -0.06, 0.06)):
        world, scene, yes = shown(SongsConfig(popularity_effect=effect, position_effect=0.0))
        popular = world.popularity_N[scene.candidates_RC]
        order = np.argsort(popular, axis=None)
        third = len(order) // 3
        difference = yes.ravel()[order[-third:]].mean() - yes.ravel()[order[:third]].mean()
        assert least < difference < most


def test_exposure_follows_zipfs_law() -> None:
    config = replace(SongsConfig(), late_share=0.0, zipf=1.0)
    world = build_world(config)
    first = draw_items(world, "test", np.full(40_000, world.end))[:, 0]
    counts = np.bincount(first, minlength=config.num_items)
    wanted = world.weights_N / world.weights_N.sum() * len(first)
    assert (abs(counts - wanted) < 5 * np.sqrt(wanted) + 5).all()


@by_task
def test_labels_come_as_often_as_the_truth_says(domain: Domain, task: str) -> None:
    impressions = platform_of(domain.name).impressions(task, 400)
    for code in range(len(impressions.outcome.labels)):
        truth = impressions.truth_RCL[..., code].ravel()
        hit = (impressions.labels_RC == code).ravel()
        for part in np.array_split(np.argsort(truth), 5):
            expected, spread = truth[part].sum(), np.sqrt((truth[part] * (1 - truth[part])).sum())
            assert abs(hit[part].sum() - expected) < 4.5 * spread


def test_noise_draws_a_part_of_the_labels_blindly() -> None:
    utility = np.array([[-50.0, 50.0]])
    outcome = yes_or_no(0.0, attention=0.0)
    truth = label_probabilities(SongsConfig(noise=0.2), outcome, utility)
    np.testing.assert_allclose(truth[0, :, 0], [0.1, 0.9], atol=1e-12)


@by_task
def test_the_truth_ranks_better_than_popularity(domain: Domain, task: str) -> None:
    platform = platform_of(domain.name)
    impressions = platform.impressions(task, 400)
    grade = impressions.outcome.slopes
    best = int(np.argmax(grade)) if max(grade) > 0 else 0
    hit = (impressions.labels_RC == best).ravel()
    of_truth = auc(hit, impressions.truth_RCL[..., best].ravel())
    assert of_truth > 0.65
    if not domain.surfaces[task].from_table:
        popularity = platform.world.popularity_N[impressions.scene.candidates_RC].ravel()
        of_popularity = auc(hit, popularity)
        assert of_truth > max(of_popularity, 1 - of_popularity) + 0.1


def test_a_small_learner_recovers_the_planted_taste() -> None:
    from scipy.sparse import coo_matrix, csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    config = SongsConfig(num_members=20, num_items=300, num_requests=4000, late_share=0.0)
    world, scene, yes = shown(config, 4000)
    attributes = world.items_NK[scene.candidates_RC.ravel()]
    num_rows, width = attributes.shape
    members = np.repeat(scene.members_R, scene.candidates_RC.shape[1])
    rows, columns = np.nonzero(attributes)
    tastes = coo_matrix(
        (attributes[rows, columns], (rows, members[rows] * width + columns)),
        shape=(num_rows, config.num_members * width),
    )
    position = np.tile(np.log2(1 + np.arange(10)), len(scene.members_R))
    popularity = world.popularity_N[scene.candidates_RC].ravel()
    features = hstack([tastes, csr_matrix(np.stack([position, popularity], axis=1))]).tocsr()
    labels, cut = yes.ravel(), int(0.8 * num_rows)
    learner = LogisticRegression(C=1.0, max_iter=300).fit(features[:cut], labels[:cut])
    truth = label_probabilities(config, yes_or_no(0.0), scene.utility_RC)[..., 0].ravel()
    ceiling = auc(labels[cut:], truth[cut:])
    reached = auc(labels[cut:], learner.decision_function(features[cut:]))
    assert ceiling > 0.8
    assert ceiling - 0.03 < reached < ceiling + 0.005
    # An attribute's tastes are known up to a constant: every item has one of its values.
    learnt = learner.coef_[0, :-2].reshape(config.num_members, width)
    genre = world.columns("genre")
    pairs = [
        m[:, genre] - m[:, genre].mean(axis=1, keepdims=True) for m in (learnt, world.tastes_MK)
    ]
    assert np.corrcoef(pairs[0].ravel(), pairs[1].ravel())[0, 1] > 0.9
    assert learner.coef_[0, -2] < -0.1
    assert learner.coef_[0, -1] > 0.2


def test_what_a_prompt_says_of_the_past_tells_of_the_labels() -> None:
    platform = build_platform(SONGS, replace(SongsConfig(), num_members=60, num_requests=1500))
    told = [
        (label == "like", float(item.fields["liked_of_genre"]))
        for simulated in platform.examples("song-like")
        if simulated.split == "test"
        for item, label in zip(
            simulated.example.request.candidates, simulated.example.labels, strict=True
        )
        if "liked_of_genre" in item.fields
    ]
    assert auc(*zip(*told, strict=True)) > 0.65


# Surfaces of their own


def test_the_grade_of_a_result_rises_with_what_it_has_of_the_query() -> None:
    grades: dict[int, list[int]] = {}
    for simulated in examples_of("shopping", "search-relevance"):
        request = simulated.example.request
        words = str(request.profile["query"]).split()
        for item, label in zip(request.candidates, simulated.example.labels, strict=True):
            text = str(item.fields["title"]).lower().replace(",", "").split()
            grades.setdefault(sum(w in text for w in words) * 4 // len(words), []).append(
                int(label)
            )
    means = [np.mean(grades[share]) for share in sorted(grades)]
    assert means == sorted(means)
    assert means[0] < 1
    assert means[-1] > 3


@pytest.mark.parametrize("task", ["query-suggestion", "product-next", "song-next"])
def test_exactly_one_candidate_is_chosen(task: str) -> None:
    source = TASK_SOURCES[task]
    assert isinstance(source, Domain)
    for simulated in examples_of(source.name, task):
        assert simulated.example.labels.count("Yes") == 1
        assert sum(shares["Yes"] for shares in simulated.truth) == pytest.approx(1)


def test_suggested_queries_begin_with_the_letters_typed() -> None:
    for simulated in examples_of("shopping", "query-suggestion"):
        request = simulated.example.request
        queries = [str(item.fields["query"]) for item in request.candidates]
        assert all(query.startswith(str(request.profile["typed"])) for query in queries)
        assert len(set(queries)) == len(queries)


def test_authors_whom_a_member_follows_are_not_suggested() -> None:
    for simulated in examples_of("feed", "post-follow"):
        request = simulated.example.request
        follows = request.profile["follows"]
        assert not {item.fields["author"] for item in request.candidates} & set(follows)


def test_the_page_of_an_item_does_not_show_the_item() -> None:
    for domain, task in SIMULATED_TASKS:
        if task.endswith("-similar"):
            scene = platform_of(domain.name).impressions(task, 300).scene
            _, _, sources = scene.profile["source_title"]
            assert not (scene.candidates_RC == sources[:, None]).any()
            assert all(len(set(row)) == len(row) for row in scene.candidates_RC.tolist())


def test_a_message_is_opened_less_the_more_were_sent() -> None:
    platform = build_platform(POSTS, replace(small(POSTS), position_effect=0.0))
    scene = platform.impressions("post-notification", 3000).scene
    sent = np.array(scene.profile["messages_this_week"])
    truth = platform.impressions("post-notification", 3000).truth_RCL[..., 0].mean(axis=1)
    assert truth[sent == 0].mean() > truth[sent >= 3].mean() + 0.05


def test_the_log_is_drawn_apart_from_every_surface() -> None:
    world = build_world(small(SONGS))
    log = simulate_log(world)
    other = Platform(SONGS, world, log)
    other.impressions("song-next", 50)
    np.testing.assert_array_equal(simulate_log(world).labels_RC, log.labels_RC)


# Films


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), turn_after=None)


def write_films(folder: Path, *, turn_after: int | None) -> Path:
    """Write a small MovieLens; ratings after a moment may be turned around."""
    random = np.random.default_rng(3)
    num_rows, num_films = 1500, 120
    times = np.sort(random.integers(900_000_000, 1_000_000_000, num_rows))
    pairs = random.permutation(20 * num_films)[:num_rows]
    ratings = random.integers(1, 11, num_rows) / 2
    if turn_after is not None:
        ratings = np.where(times > turn_after, 5.5 - ratings, ratings)
    kinds = ["Drama", "Comedy", "Action|Sci-Fi", "Horror"]
    pl.DataFrame(
        {
            "user_id": pairs // num_films,
            "item_id": pairs % num_films,
            "rating": ratings,
            "timestamp": times,
        }
    ).write_parquet(folder / "ratings.parquet")
    pl.DataFrame(
        {
            "item_id": range(num_films),
            "title": [f"Film {number} ({1960 + number % 60})" for number in range(num_films)],
            "genres": [kinds[number % 4] for number in range(num_films)],
        }
    ).write_parquet(folder / "items.parquet")
    pl.DataFrame(
        {
            "user_id": random.integers(0, 20, 60),
            "item_id": random.integers(0, num_films, 60),
            "tag": [["noir", "Space", "slow"][number % 3] for number in range(60)],
            "timestamp": random.integers(950_000_000, 1_000_000_000, 60),
        }
    ).write_parquet(folder / "tags.parquet")
    return folder


@pytest.mark.parametrize("task", FILM_NAMES)
def test_a_film_task_fills_every_field_action_and_label(films: Path, task: str) -> None:
    check_against_task(library_tasks()[task], list(film_examples(task, films)))


@pytest.mark.parametrize("task", FILM_NAMES)
def test_a_film_task_gives_the_same_rows_again(films: Path, task: str) -> None:
    assert list(film_examples(task, films)) == list(film_examples(task, films))


@pytest.mark.parametrize("task", ["movie-dislike", "movie-premiere", "movie-rating", "movie-next"])
def test_later_ratings_change_no_earlier_film_request(
    films: Path, tmp_path: Path, task: str
) -> None:
    cut = 960_000_000
    turned = write_films(tmp_path, turn_after=cut)
    before, after = (
        [e.request for e in film_examples(task, folder) if (e.request.time or 0) <= cut]
        for folder in (films, turned)
    )
    assert len(before) > 10
    assert before == after


@pytest.mark.parametrize("task", FILM_NAMES)
def test_a_film_history_lies_strictly_before_its_request(films: Path, task: str) -> None:
    for example in film_examples(task, films):
        assert all(event.time < (example.request.time or 0) for event in example.request.history)


@pytest.mark.parametrize("task", ["movie-like", "movie-next", "movie-rating"])
def test_a_film_request_bears_the_member_whose_history_it_tells(films: Path, task: str) -> None:
    titles = pl.read_parquet(films / "items.parquet")["title"].to_list()
    ratings = pl.read_parquet(films / "ratings.parquet")
    rated = {
        (user, titles[film], float(time))
        for user, film, time in ratings.select("user_id", "item_id", "timestamp").iter_rows()
    }
    made = list(film_examples_by_member(task, films))
    assert [example for _, example in made] == list(film_examples(task, films))
    assert len({user for user, _ in made}) == 20
    for user, example in made:
        for event in example.request.history:
            assert (user, event.item.fields["title"], event.time) in rated


def test_films_without_ratings_are_refused(tmp_path: Path) -> None:
    folder = write_films(tmp_path, turn_after=None)
    pl.read_parquet(folder / "ratings.parquet").drop("rating").write_parquet(
        folder / "ratings.parquet"
    )
    with pytest.raises(DataError, match="ratings: should have the columns rating"):
        list(film_examples("movie-rating", folder))


# The embedded ranker scores every task as it is


def test_labels_of_every_task_are_tokens_of_the_embedded_ranker() -> None:
    from transformers import AutoTokenizer

    folder = Path(__file__).parents[2] / "rankonce" / "embedded"
    renderer = Renderer(TextEncoder(AutoTokenizer.from_pretrained(folder)), max_prompt_tokens=4096)
    for task in library_tasks().values():
        rendered = renderer.render(task, read_request(example_request(task)))
        assert [len(ids) for ids in rendered.tokens.label_ids] == [1] * len(task.labels)
