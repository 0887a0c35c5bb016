"""Shopping search: members with favourite brands, colours and prices, and queries with intent."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from rankonce.datasets.domains.platform import Domain, Fields, Surface, names
from rankonce.datasets.domains.surfaces import (
    beside_source,
    for_query,
    home,
    messages,
    newest_items,
    query_text,
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
    graded,
    stream,
    yes_or_no,
)
from rankonce.prompts.features import Floats

_PRICES = {
    "running shoes": 90, "rucksack": 70, "desk lamp": 45, "coffee grinder": 110,
    "rain jacket": 120, "headphones": 150, "frying pan": 40, "yoga mat": 30, "office chair": 220,
    "water bottle": 20, "bed linen": 60, "bicycle helmet": 80,
}  # fmt: skip
# What a category goes well with: the next one, two and two.
_GOES_WITH = (1, 0, 8, 6, 11, 7, 3, 5, 2, 10, 9, 4)
_LEVELS = {"budget": 0.5, "fair": 0.9, "upmarket": 1.4, "luxury": 2.4}
_QUERY_PARTS = ("category", "brand", "colour", "material")

_LOG = Outcome(
    labels=("buy", "open", "pass"),
    slopes=(1.3, 0.6, 0.0),
    biases=(-2.6, -0.6, 0.3),
    attention=(1.0, 1.0, 0.0),
)


@dataclass(frozen=True, kw_only=True)
class ProductsConfig(SimulatorConfig):
    """A shop with search; what stands below is seen far less."""

    attributes: tuple[Attribute, ...] = (
        Attribute(name="category", values=tuple(_PRICES), weight=1.0),
        Attribute(
            name="brand",
            values=("Norvik", "Aldo Bay", "Kestrel", "Mirava", "Tondo", "Halm", "Osprey Lane",
                    "Quill", "Rivet", "Sunda"),
            weight=0.9,
        ),
        Attribute(
            name="colour",
            values=("black", "white", "red", "navy", "olive", "grey", "yellow"),
            weight=0.6,
        ),
        Attribute(
            name="material",
            values=("recycled", "cotton", "steel", "bamboo", "leather"),
            weight=0.4,
        ),
        Attribute(name="price_level", values=tuple(_LEVELS), weight=0.9),
    )  # fmt: skip
    log: Outcome = _LOG
    position_effect: float = 0.6


def _items(world: World) -> list[Fields]:
    fields: list[Fields] = []
    for item in range(world.config.num_items):
        (category,), (brand,) = world.words("category", item), world.words("brand", item)
        (colour,), (material,) = world.words("colour", item), world.words("material", item)
        (level,) = world.words("price_level", item)
        price = _PRICES[category] * _LEVELS[level] * (0.9 + 0.2 * (item * 61 % 100) / 100)
        fields.append(
            {
                "title": f"{brand} {category}, {material}, {colour}",
                "category": category,
                "brand": brand,
                "colour": colour,
                "material": material,
                "price": round(price, 2),
                # Against others of the category.
                "price_ratio": round(price / _PRICES[category], 3),
                "text": (
                    f"These {category} by {brand} come in {colour}."
                    if category.endswith(("shoes", "phones"))
                    else f"This {category} by {brand} comes in {colour}."
                )
                + f" Material: {material}. Price: {price:.0f} euros.",
            }
        )
    return fields


def _members(world: World) -> list[Fields]:
    brands, levels = world.attribute("brand").values, list(_LEVELS.values())
    return [
        {"favourite_brands": [brands[code] for code in liked], "usual_price": levels[level]}
        for liked, (level,) in zip(
            world.favourites("brand", 2).tolist(),
            world.favourites("price_level", 1).tolist(),
            strict=True,
        )
    ]


def _basket(world: World, name: str, count: int) -> Scene:
    """Something lies in the basket; of what is shown exactly one is put beside it."""
    members, times = draw_requests(world, name, count)
    held = draw_one_item(world, f"{name} baskets", times)
    categories = world.values["category"][:, 0]
    wanted = np.array(_GOES_WITH)[categories[held]]
    towards = np.zeros((count, world.items_NK.shape[1]))
    towards[np.arange(count), world.columns("category").start + wanted] = 1
    items = draw_items(world, name, times, towards_RK=towards, pull=2.0)
    goes_with = categories[items] == wanted[:, None]
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=items,
        utility_RC=world.item_utility(members, times, items) + 2.0 * goes_with,
        profile={"basket": ("item", "title", held)},
    )


def _price_drops(world: World, name: str, count: int) -> Scene:
    """Messages about products that became cheaper."""
    scene = messages(world, name, count)
    random = stream(world.config, f"{name} prices")
    off = random.choice([0.1, 0.15, 0.2, 0.3, 0.5], scene.candidates_RC.shape)
    return Scene(
        members_R=scene.members_R,
        times_R=scene.times_R,
        candidates_RC=scene.candidates_RC,
        utility_RC=scene.utility_RC + 3.0 * (off - 0.2),
        profile=scene.profile,
        candidate={"discount": off.tolist()},
    )


def _suggestions(world: World, name: str, count: int) -> Scene:
    """Queries that begin with the letters typed; the member means exactly one of them."""
    texts, features, weights = _queries(world)
    by_prefix: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        for length in (1, 2, 3, 4):
            by_prefix[text[:length]].append(number)
    size = min(world.config.candidates_per_request, 8)
    prefixes = sorted(p for p, own in by_prefix.items() if len(own) >= size and p == p.strip())
    members, times = draw_requests(world, name, count)
    random = stream(world.config, f"{name} queries")
    typed = [prefixes[place] for place in random.integers(0, len(prefixes), count).tolist()]
    clocks = random.standard_exponential((count, len(texts))) / weights
    shown = np.array(
        [
            sorted(by_prefix[prefix], key=row.__getitem__)[:size]
            for prefix, row in zip(typed, clocks, strict=True)
        ]
    )
    spread = np.log(weights)
    popularity = (spread - spread.mean()) / spread.std()
    rank = 100.0 * np.argsort(np.argsort(weights)) / len(weights)
    utility = world.taste_match(members, features[shown])
    return Scene(
        members_R=members,
        times_R=times,
        candidates_RC=shown,
        utility_RC=utility + world.config.popularity_effect * popularity[shown],
        profile={"typed": typed},
        candidate={
            "query": [[texts[number] for number in row] for row in shown.tolist()],
            "popularity": rank[shown].tolist(),
            "num_words": [[len(texts[number].split()) for number in row] for row in shown.tolist()],
        },
    )


def _queries(world: World) -> tuple[list[str], Floats, Floats]:
    """Queries that fit products of the first day, with features and how often they are asked."""
    weights: dict[str, float] = defaultdict(float)
    rows: dict[str, Floats] = {}
    early = np.flatnonzero(world.released_N < world.config.start)
    for item in early.tolist():
        for parts in (("category",), ("category", "brand"), ("category", "colour"),
                      ("category", "colour", "brand"), ("category", "material")):  # fmt: skip
            text = query_text(world, item, parts)
            weights[text] += float(world.weights_N[item]) / len(parts)
            if text not in rows:
                kept = np.zeros(world.items_NK.shape[1])
                for part in parts:
                    kept[world.columns(part)] = 1
                rows[text] = world.items_NK[item] * kept
    texts = sorted(weights)
    return texts, np.stack([rows[t] for t in texts]), np.array([weights[t] for t in texts])


_BOUGHT = names(buy="bought", open="opened")

PRODUCTS = Domain(
    name="shopping",
    config=ProductsConfig,
    kind="category",
    item_fields=_items,
    member_fields=_members,
    surfaces={
        "product-launch": Surface(
            outcome=yes_or_no(-0.6),
            draw=newest_items,
            profile=names("favourite_brands", "usual_price"),
            candidate=names(
                "title",
                "category",
                "price_ratio",
                released="age",
                bought_of_category="member_share",
            ),
            event=("title",),
            actions=_BOUGHT,
            taken=("buy",),
        ),
        "product-next": Surface(
            outcome=choose_one(),
            draw=_basket,
            profile=names("basket", "usual_price"),
            candidate=names("title", "category", "price_ratio", popularity="percentile"),
            event=("title",),
            actions=names(buy="bought"),
            taken=("buy",),
        ),
        "product-notification": Surface(
            outcome=yes_or_no(-0.9, attention=0.0),
            draw=_price_drops,
            profile=names(
                "favourite_brands",
                "part_of_day",
                "usual_part_of_day",
                "messages_this_week",
                last_visit="since_last_visit",
            ),
            candidate=names("title", "price", "discount", num_buyers="times_taken"),
            event=("title",),
            actions=_BOUGHT,
            taken=("buy",),
        ),
        "product-purchase": Surface(
            outcome=yes_or_no(-1.2),
            draw=for_query(parts=_QUERY_PARTS, weight=4.0, personal=0.8),
            profile=names("query", "usual_price", products_seen="times_shown"),
            candidate=names(
                "title",
                "price",
                "price_ratio",
                popularity="percentile",
                buy_share="taken_share",
                bought_of_category="member_share",
            ),
            event=("title",),
            actions=_BOUGHT,
            taken=("buy",),
        ),
        "product-rating": Surface(
            outcome=graded("1", "2", "3", "4", "5", slope=0.7),
            draw=home,
            profile=names("favourite_brands", "usual_price"),
            candidate=names("title", "price_ratio", num_buyers="times_taken"),
            event=("title", "category"),
            actions=_BOUGHT,
            taken=("buy",),
        ),
        "product-similar": Surface(
            outcome=yes_or_no(-0.4),
            draw=beside_source(
                weight=5.0,
                fields=("title", "category", "brand", "colour", "price"),
                of=("category", "brand", "colour", "material", "price_level"),
                personal=0.2,
            ),
            profile=names(
                "source_title", "source_category", "source_brand", "source_colour", "source_price"
            ),
            candidate=names("title", "category", "brand", "price", num_buyers="times_taken"),
            taken=("buy",),
        ),
        "query-suggestion": Surface(
            outcome=choose_one(),
            draw=_suggestions,
            profile=names("typed", "favourite_brands"),
            candidate=names("query", "num_words", "popularity"),
            event=("title",),
            actions=_BOUGHT,
            from_table=True,
        ),
        "search-relevance": Surface(
            outcome=graded("0", "1", "2", "3", "4"),
            draw=for_query(parts=_QUERY_PARTS, weight=6.0, personal=0.0),
            profile=names("query"),
            candidate=names("title", "text"),
            taken=("buy",),
        ),
    },
)
