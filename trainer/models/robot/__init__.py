"""A small policy that learns on a CPU: keypoints of each view, words, state and estimated positions -> action tokens.

In: sizes, and a tokenizer that has a token for each number of a state. Out: a model that the Auto classes load.
Read `modeling` (the whole model in one file that imports only torch and transformers, since exports carry it: auto_map), then
`building` (a random one, with its image processor). Source: a study of ours on four ManiSkill tasks.
"""
