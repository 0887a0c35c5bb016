"""What a table of means says of the requests of distillation-songs.yaml, as JSON.

    python experiments/songs_table.py songs/train.jsonl songs/test.jsonl

A candidate's score is the mean label of the train rows that share as much with their source: genre,
mood, artist, and how many years lie between.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from rankonce.environment import describe_environment
from rankonce.evaluation.metrics import auc
from rankonce.training.data import read_examples


def read_rows(path: str) -> list[tuple[tuple[object, ...], str, int]]:
    """Give what two songs share, the prompt's facts, and 1 for Yes, a row a candidate."""
    rows = []
    for example in read_examples(Path(path)):
        source = example.request.profile
        for item, label in zip(example.request.candidates, example.labels, strict=True):
            same = tuple(
                source.get(f"source_{name}") == item.fields.get(name)
                for name in ("genre", "mood", "artist")
            )
            gap = abs(int(str(source["source_year"])) - int(str(item.fields["year"]))) // 5
            facts = json.dumps([dict(source), dict(item.fields)], sort_keys=True)
            rows.append(((*same, gap), facts, int(label == "Yes")))
    return rows


train, test = (read_rows(path) for path in sys.argv[1:3])
sums: dict[tuple[object, ...], list[int]] = defaultdict(lambda: [0, 0])
for shared, _, liked in train:
    sums[shared][0] += liked
    sums[shared][1] += 1
mean = sum(liked for _, _, liked in train) / len(train)
# As if twenty labels of the average had come before.
scores = [(sums[shared][0] + 20 * mean) / (sums[shared][1] + 20) for shared, _, _ in test]
known = {facts for _, facts, _ in train}
print(
    json.dumps(
        {
            "auc": auc([liked for _, _, liked in test], scores),
            "rows": len(test),
            "rows_with_a_prompt_of_train": sum(facts in known for _, facts, _ in test),
            "prompts": len({facts for _, facts, _ in test}),
            "environment": describe_environment(),
        },
        indent=1,
    )
)
