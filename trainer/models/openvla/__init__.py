"""OpenVLA on transformers 5: the published folder's layout, names and numbers, without timm and without remote code.

In: a folder with model_type `openvla`. Out: a model that the Auto classes load, that trains, generates and saves the same names.
Read `configuration` (config.json), `vision` (two vision transformers with timm's names), `modeling` (towers, projector, Llama),
`actions` (token ids to actions, as the published code does it), `saving` (config.json and statistics of an export), `tiny` (a
small random one).
"""
