"""Jobs: members with a trade, skills and a place, and openings that companies post."""

from dataclasses import dataclass

import numpy as np

from rankonce.datasets.domains.platform import Domain, Fields, Surface, names
from rankonce.datasets.domains.surfaces import (
    beside_source,
    for_query,
    home,
    messages,
    newcomers,
    newest_items,
)
from rankonce.datasets.simulator import (
    Attribute,
    Outcome,
    Scene,
    SimulatorConfig,
    World,
    draw_members,
    draw_one_item,
    draw_requests,
    yes_or_no,
)

_SKILLS = {
    "Backend Engineer": ("Python", "PostgreSQL", "Kubernetes", "Go"),
    "Data Analyst": ("SQL", "Excel", "Tableau", "statistics"),
    "Registered Nurse": ("intensive care", "triage", "wound care", "paediatrics"),
    "Accountant": ("bookkeeping", "tax returns", "payroll", "auditing"),
    "Product Designer": ("Figma", "user research", "prototyping", "typography"),
    "Electrician": ("wiring", "solar panels", "fault finding", "lift maintenance"),
    "Primary Teacher": ("reading", "classroom music", "special needs", "mathematics"),
    "Sales Manager": ("negotiation", "key accounts", "forecasting", "trade fairs"),
    "Warehouse Operator": ("forklift", "stock control", "night shifts", "packing"),
    "Chef": ("pastry", "menu planning", "vegan cooking", "grill"),
}
_LEVELS = ("Junior", "Mid-level", "Senior", "Lead")
_PAY_BY_TRADE = (62, 48, 41, 50, 55, 44, 42, 58, 31, 36)

_LOG = Outcome(
    labels=("apply", "view", "dismiss"),
    slopes=(1.2, 0.5, -0.3),
    biases=(-2.2, 0.0, 0.3),
    attention=(1.0, 0.6, 0.0),
)


@dataclass(frozen=True, kw_only=True)
class JobsConfig(SimulatorConfig):
    """A job board; new openings draw more, and few who look apply."""

    attributes: tuple[Attribute, ...] = (
        Attribute(name="trade", values=tuple(_SKILLS), weight=1.6),
        Attribute(
            name="skills",
            values=tuple(skill for skills in _SKILLS.values() for skill in skills),
            weight=0.9,
            per_item=2,
            parent="trade",
        ),
        Attribute(name="level", values=_LEVELS, weight=0.7),
        Attribute(
            name="location",
            values=("Hamburg", "Lyon", "Porto", "Leeds", "Turin", "Gdansk", "Remote"),
            weight=0.9,
        ),
        Attribute(
            name="company",
            values=tuple(
                f"{first} {second}"
                for first in ("Alder", "Birch", "Cedar", "Elm", "Fir", "Maple")
                for second in ("Works", "Group", "Labs")
            ),
            weight=0.4,
        ),
    )
    log: Outcome = _LOG
    freshness_effect: float = 0.15


def _items(world: World) -> list[Fields]:
    fields: list[Fields] = []
    for item in range(world.config.num_items):
        (trade,), (level,) = world.words("trade", item), world.words("level", item)
        (company,), (location,) = world.words("company", item), world.words("location", item)
        skills = world.words("skills", item)
        # A fifth above or below the usual pay, from the number of the opening.
        usual = _PAY_BY_TRADE[world.values["trade"][item, 0]] * (0.8 + 0.25 * _LEVELS.index(level))
        where = "from home" if location == "Remote" else f"in {location}"
        fields.append(
            {
                "title": trade if level == "Mid-level" else f"{level} {trade}",
                "company": company,
                "location": location,
                "skills": skills,
                "description": f"You work {where} with {' and '.join(skills)} at {company}.",
                "pay": round(1000 * usual * (0.8 + 0.4 * (item * 37 % 100) / 100), -2),
            }
        )
    return fields


def _members(world: World) -> list[Fields]:
    trade = world.favourites("trade", 1)[:, 0]
    level = world.favourites("level", 1)[:, 0]
    place = world.favourites("location", 1)[:, 0]
    skills = world.favourites("skills", 2, within=trade)
    trades, skill_names = world.attribute("trade").values, world.attribute("skills").values
    return [
        {
            "headline": trades[t] if _LEVELS[v] == "Mid-level" else f"{_LEVELS[v]} {trades[t]}",
            "location": world.attribute("location").values[p],
            "skills": [skill_names[code] for code in known],
            "years_of_experience": (1, 4, 8, 14)[v] + member % 3,
        }
        for member, (t, v, p, known) in enumerate(
            zip(trade.tolist(), level.tolist(), place.tolist(), skills.tolist(), strict=True)
        )
    ]


def _outreach(world: World, name: str, count: int) -> Scene:
    """A recruiter's opening, and the members whom a search has found for it."""
    _, times = draw_requests(world, name, count)
    jobs = draw_one_item(world, f"{name} jobs", times)
    wanted = world.items_NK[jobs]
    members = draw_members(world, name, times, towards_RK=wanted, pull=0.4)
    people = _members(world)
    found = [[people[member] for member in row] for row in members.tolist()]
    profile_fields = ("title", "company", "location", "skills", "pay")
    return Scene(
        members_R=np.full(count, -1),
        times_R=times,
        candidates_RC=members,
        utility_RC=np.einsum("rck,rk->rc", world.tastes_MK[members], wanted),
        profile={field: ("item", field, jobs) for field in profile_fields},
        candidate={
            **{field: [[person[field] for person in row] for row in found] for field in people[0]},
            "since_joined": (times[:, None] - world.joined_M[members]).tolist(),
        },
    )


_ACTIONS = {"apply": "applied", "view": "viewed", "dismiss": "dismissed"}
_PERSON = names("headline", "location", "skills", "years_of_experience")

JOBS = Domain(
    name="jobs",
    config=JobsConfig,
    kind="trade",
    item_fields=_items,
    member_fields=_members,
    surfaces={
        "job-apply": Surface(
            outcome=_LOG,
            draw=None,
            profile=_PERSON,
            candidate=names(
                "title",
                "company",
                "location",
                "description",
                posted="age",
                num_applicants="times_taken",
            ),
            event=("title", "company", "location"),
            actions=_ACTIONS,
            taken=("apply",),
        ),
        "job-dismiss": Surface(
            outcome=yes_or_no(-1.0, slope=-1.0, attention=0.5),
            draw=home,
            profile=names(
                "headline", "location", jobs_seen="times_shown", dismiss_share="taken_share"
            ),
            candidate=names(
                "title",
                "company",
                "location",
                "pay",
                dismissed_by="taken_share",
                dismissed_trade="member_share",
            ),
            event=("title", "company", "location"),
            actions=_ACTIONS,
            taken=("dismiss",),
        ),
        "job-newcomer": Surface(
            outcome=yes_or_no(-0.4),
            draw=newcomers,
            profile=_PERSON,
            candidate=names(
                "title",
                "company",
                "location",
                "skills",
                popularity="percentile",
                apply_share="taken_share",
            ),
            taken=("apply",),
        ),
        "job-notification": Surface(
            outcome=yes_or_no(-0.6, attention=0.0),
            draw=messages,
            profile=names(
                "headline",
                "location",
                "part_of_day",
                "usual_part_of_day",
                "messages_this_week",
                last_visit="since_last_visit",
            ),
            candidate=names("title", "company", "location", posted="age"),
            event=("title", "location"),
            actions=names(apply="applied", view="viewed"),
            taken=("apply", "view"),
        ),
        "job-opening": Surface(
            outcome=yes_or_no(-0.8),
            draw=newest_items,
            profile=names("headline", "skills", "location"),
            candidate=names(
                "title",
                "company",
                "location",
                "skills",
                "pay",
                "description",
                posted="age",
                apply_share_of_trade="member_share",
            ),
            event=("title", "skills", "location"),
            actions=names(apply="applied", view="viewed"),
            taken=("apply",),
        ),
        "job-outreach": Surface(
            outcome=yes_or_no(-0.7, attention=0.0),
            draw=_outreach,
            profile=names("title", "company", "location", "skills", "pay"),
            candidate={**_PERSON, "since_joined": "since_joined"},
            from_table=True,
        ),
        "job-search": Surface(
            outcome=yes_or_no(-0.3),
            draw=for_query(
                parts=("trade", "level", "location", "skills"), weight=4.0, personal=0.6
            ),
            profile=names("query", "headline", "location"),
            candidate=names(
                "title", "company", "location", "skills", posted="age", popularity="percentile"
            ),
            event=("title", "company", "location"),
            actions=names(apply="applied", view="viewed"),
            taken=("apply", "view"),
        ),
        "job-similar": Surface(
            outcome=yes_or_no(-0.5),
            draw=beside_source(
                weight=4.0,
                fields=("title", "company", "location", "skills", "pay"),
                of=("trade", "skills", "level", "location"),
                personal=0.2,
            ),
            profile=names(
                "source_title", "source_company", "source_location", "source_skills", "source_pay"
            ),
            candidate=names(
                "title", "company", "location", "skills", "pay", num_applicants="times_taken"
            ),
            taken=("apply",),
        ),
    },
)
