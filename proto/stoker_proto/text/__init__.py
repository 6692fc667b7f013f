"""Text and turns -> token ids and labels.

In: instructions, dialogues, plain text, robot states. Out: rows of int32 token ids and labels.
Read `tokenizer` (with `token_bytes` and `control_tokens`), `turns`, `dialogue` and `rows` (one question, one answer),
then `chat_template`, `chat_frames`, `chat_spans`, `rendered`, `chat_rows` (several turns), `text_rows` and `state_text`.
"""
