"""Camera frames -> the model's pixels -> the bytes that travel.

In: uint8[H, W, 3] frames and a model's folder. Out: encoded images on the loader's side, uint8 pixels on the trainer's side.
Read `spec` (what one model needs), `families` (model folder -> spec), `geometry` and `resize`, `augment`, then `transport`.
"""
