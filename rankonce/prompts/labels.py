"""Labels are single tokens: each label of a task as the ids that count as it."""

from rankonce.errors import LabelError
from rankonce.prompts.encoding import TextEncoder
from rankonce.prompts.tasks import Task


def resolve_labels(task: Task, encoder: TextEncoder) -> tuple[tuple[int, ...], ...]:
    """Find the token of every label and surface form at the task's answer slot.

    Returns:
        For every label of the task the distinct token ids that count as it.

    Raises:
        LabelError: names the label and the ids it splits into, or the two that share a token.
    """
    owner: dict[int, str] = {}
    resolved = []
    for label in task.labels:
        ids: list[int] = []
        for form in (encoder.label_lead + label.name, *label.surface_forms):
            answer_ids = encoder.encode_answer(task.answer_slot, form)
            if len(answer_ids) != 1:
                raise LabelError(
                    f"labels: {form!r} of task {task.name!r} should be one token, but the "
                    f"tokenizer splits it into {answer_ids}"
                )
            (token_id,) = answer_ids
            if owner.setdefault(token_id, label.name) != label.name:
                raise LabelError(
                    f"labels: {owner[token_id]!r} and {label.name!r} of task {task.name!r} are "
                    f"the same token {token_id}"
                )
            if token_id not in ids:
                ids.append(token_id)
        resolved.append(tuple(ids))
    return tuple(resolved)
