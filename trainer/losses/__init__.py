"""What training minimises (`trainer.loss`); what is reported stays the NLL of the labels, so that runs compare.

In: logits, targets and the estimates of an auxiliary head. Out: the loss of each label and of each row.
Read `interface`, `registry` (names, and a user's class by dotted path), `cross_entropy`, `ordinal`, `auxiliary`.
"""
