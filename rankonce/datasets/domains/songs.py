"""Music: members with favourite artists, genres and moods, and songs that they play or skip."""

from dataclasses import dataclass, replace

import numpy as np

from rankonce.datasets.domains.platform import Domain, Fields, Surface, names
from rankonce.datasets.domains.surfaces import (
    beside_source,
    home,
    newcomers,
    newest_items,
    only,
)
from rankonce.datasets.simulator import (
    Attribute,
    Outcome,
    Scene,
    SimulatorConfig,
    World,
    choose_one,
    draw_items,
    draw_one_item,
    draw_requests,
    stream,
    yes_or_no,
)

_GENRES = ("folk", "techno", "jazz", "hip-hop", "metal", "soul", "classical", "indie pop")
_ARTISTS = (
    "Juniper Vale", "The Millpond", "Hazel & Rye", "Kolt", "Nachtzug", "Sine Garden",
    "Blue Ferry Trio", "Ada Monroe", "Quiet Brass", "Miss Ledger", "Tall Order", "Sixth Floor",
    "Iron Heron", "Grave Tide", "Vulk", "Lena Shore", "The Amberlights", "Otis Wren",
    "Orchestra Nova", "Maren Holt", "Quartet Silene", "Paper Kites Club", "Ivy Motel", "Soft Maps",
)  # fmt: skip
_FIRST = (
    "Silver", "Last", "Paper", "Midnight", "Broken", "Golden", "Distant", "Second", "Hollow",
    "Open", "Winter", "Lonely", "Electric", "Salt", "Borrowed", "Endless", "Crooked", "Velvet",
    "Early", "Northern",
)  # fmt: skip
_SECOND = (
    "River", "Train", "Summer", "Window", "Letter", "Harbour", "Signal", "Garden", "Mirror", "Road",
    "Morning", "Engine", "Shadow", "Kitchen", "Bridge", "Season", "Lantern", "Ocean", "Promise",
    "Machine", "Stranger", "Tower", "Feather", "Circus", "Weather", "Dance",
)  # fmt: skip
_MOODS = {"calm": "Slow evening", "happy": "Good morning", "sad": "Rainy day", "wild": "Full speed",
          "dreamy": "Far away"}  # fmt: skip

_LOG = Outcome(
    labels=("like", "finish", "skip"),
    slopes=(1.2, 0.5, -0.5),
    biases=(-1.6, 0.4, 0.0),
    attention=(0.3, 0.0, 0.0),
)


@dataclass(frozen=True, kw_only=True)
class SongsConfig(SimulatorConfig):
    """A player; a song that plays by itself is heard whatever its position."""

    attributes: tuple[Attribute, ...] = (
        Attribute(name="genre", values=_GENRES, weight=1.3),
        Attribute(name="artist", values=_ARTISTS, weight=0.8, parent="genre"),
        Attribute(name="mood", values=tuple(_MOODS), weight=0.7),
        Attribute(name="decade", values=("1980", "1990", "2000", "2010", "2020"), weight=0.6),
    )
    log: Outcome = _LOG
    popularity_effect: float = 0.5
    position_effect: float = 0.3
    num_items: int = 500


def _items(world: World) -> list[Fields]:
    fields: list[Fields] = []
    for item in range(world.config.num_items):
        (genre,), (artist,) = world.words("genre", item), world.words("artist", item)
        (mood,), (decade,) = world.words("mood", item), world.words("decade", item)
        first, turn = _FIRST[item % len(_FIRST)], item // len(_FIRST)
        # A song beyond all pairs of words is another part of the same one.
        second, part = _SECOND[turn % len(_SECOND)], turn // len(_SECOND)
        fields.append(
            {
                "title": f"{first} {second}, part {part + 1}" if part else f"{first} {second}",
                "artist": artist,
                "genre": genre,
                "mood": mood,
                "year": min(int(decade) + item % 10, 2023),
                "seconds": 150 + item * 53 % 240,
            }
        )
    return fields


def _members(world: World) -> list[Fields]:
    genres, artists = world.attribute("genre").values, world.attribute("artist").values
    return [
        {
            "favourite_genres": [genres[code] for code in liked],
            "named_artists": [artists[code] for code in named],
        }
        for liked, named in zip(
            world.favourites("genre", 2).tolist(),
            world.favourites("artist", 3).tolist(),
            strict=True,
        )
    ]


def _session(world: World, name: str, count: int) -> Scene:
    """A song has just ended; of those that could follow exactly one is played."""
    members, times = draw_requests(world, name, count)
    playing = draw_one_item(world, f"{name} playing", times)
    mood = only(world, world.items_NK[playing], ("mood", "genre"))
    items = draw_items(world, name, times, towards_RK=mood, pull=1.0)
    shared = np.einsum("rk,rck->rc", mood, world.items_NK[items])
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=world.item_utility(members, times, items) + 1.5 * shared,
        profile={
            "playing": ("item", "title", playing),
            "playing_artist": ("item", "artist", playing),
            "playing_mood": ("item", "mood", playing),
        },
    )


def _playlist(world: World, name: str, count: int) -> Scene:
    """A playlist of one mood and mostly one genre, to which its owner may add a song."""
    members, times = draw_requests(world, name, count)
    first = draw_one_item(world, f"{name} lists", times)
    theme = only(world, world.items_NK[first], ("mood", "genre"))
    held_config = replace(world.config, candidates_per_request=4)
    held = draw_items(
        replace(world, config=held_config), f"{name} held", times, towards_RK=theme, pull=4.0
    )
    items = draw_items(world, name, times, towards_RK=theme, pull=1.5)
    # What stands on the list already may be shown, and nobody adds it twice.
    held_already = (items[:, :, None] == held[:, None, :]).any(axis=2)
    shared = np.einsum("rk,rck->rc", theme, world.items_NK[items])
    random = stream(world.config, f"{name} names")
    songs = _items(world)
    moods = world.values["mood"][first, 0]
    lists = [f"{tuple(_MOODS.values())[mood]} {turn}" for mood, turn in
             zip(moods.tolist(), random.integers(1, 9, count).tolist(), strict=True)]  # fmt: skip
    own = 0.2 * world.item_utility(members, times, items)
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=own + 2.5 * (shared - 1.0) - 4.0 * held_already,
        profile={
            "playlist": lists,
            "songs": [
                [f"{songs[song]['title']} by {songs[song]['artist']}" for song in row]
                for row in held.tolist()
            ],
        },
    )


_PLAYED = names(like="liked", finish="played to the end", skip="skipped")

SONGS = Domain(
    name="music",
    config=SongsConfig,
    kind="genre",
    item_fields=_items,
    member_fields=_members,
    surfaces={
        "playlist-song": Surface(
            outcome=yes_or_no(-0.2, attention=0.5),
            draw=_playlist,
            profile=names("playlist", "songs"),
            candidate=names("title", "artist", "genre", "mood", "year"),
            taken=("like",),
        ),
        "song-finish": Surface(
            outcome=yes_or_no(0.4, attention=0.0),
            draw=home,
            profile=names(songs_played="times_shown", skip_share="taken_share"),
            candidate=names(
                "title",
                "artist",
                "genre",
                "seconds",
                skip_share="taken_share",
                skipped_of_genre="member_share",
            ),
            event=("title", "artist"),
            actions=names(finish="played to the end", like="played to the end", skip="skipped"),
            taken=("skip",),
        ),
        "song-like": Surface(
            outcome=_LOG,
            draw=None,
            profile=names("favourite_genres", songs_played="times_shown"),
            candidate=names(
                "title",
                "artist",
                "genre",
                "year",
                popularity="percentile",
                liked_of_genre="member_share",
            ),
            event=("title", "artist", "genre"),
            actions=_PLAYED,
            taken=("like",),
        ),
        "song-newcomer": Surface(
            outcome=yes_or_no(-0.2),
            draw=newcomers,
            profile=names("named_artists", "favourite_genres"),
            candidate=names(
                "title",
                "artist",
                "genre",
                "year",
                num_likes="times_taken",
                like_share="taken_share",
            ),
            taken=("like",),
        ),
        "song-next": Surface(
            outcome=choose_one(),
            draw=_session,
            profile=names("playing", "playing_artist", "playing_mood"),
            candidate=names("title", "artist", "mood", "genre", popularity="percentile"),
            event=("title", "artist"),
            actions=names(like="liked", finish="played to the end", skip="skipped"),
            taken=("like", "finish"),
        ),
        "song-release": Surface(
            outcome=yes_or_no(-0.4),
            draw=newest_items,
            profile=names("named_artists", songs_played="times_shown"),
            candidate=names(
                "title", "artist", "genre", "mood", released="age", liked_of_genre="member_share"
            ),
            event=("title", "artist", "genre"),
            actions=_PLAYED,
            taken=("like",),
        ),
        "song-similar": Surface(
            outcome=yes_or_no(-0.2, attention=0.5),
            draw=beside_source(
                weight=4.0,
                fields=("title", "artist", "genre", "mood", "year"),
                of=("genre", "artist", "mood", "decade"),
                personal=0.5,
            ),
            profile=names(
                "source_title", "source_artist", "source_genre", "source_mood", "source_year"
            ),
            candidate=names("title", "artist", "genre", "mood", "year"),
            event=("title", "artist"),
            actions=_PLAYED,
            taken=("like",),
        ),
    },
)
