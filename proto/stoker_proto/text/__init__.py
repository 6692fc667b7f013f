"""Text and turns -> token ids and labels.

In: instructions, dialogues, plain text, robot states. Out: rows of int32 token ids and labels.
Read `tokenizer` (with `token_bytes` and `control_tokens`), `turns`, `dialogue` (`data.dialogue.template`: the text around an
instruction) and `rows` (one question, one answer), then `chat_template` (the model's own) with `chat_messages`, `chat_original`
and `functions`, `chat_frames`, `chat_spans`, `chat_history` (rewritten answers), `rendered`, `chat_rows` (several turns),
`text_rows`, `labelled_rows` (ids with labels) and `state_text`; `turn_ends`, `text_notes`, `assistant_tokens` and
`exported_template` serve loader-prepare and exports.
"""
