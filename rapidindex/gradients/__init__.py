"""Per-example gradients and RapidGrads: arrays in, arrays out. Knows no store and no data files.

losses         example and token losses, and the layers of the flattened gradient
factors        a weight's gradients before their outer products are summed
per_example    the gradients of a padded batch, one layer at a time, from hooks
second_moment  the corrections: preconditioners, and the second moments that they take
blocks         layers grouped by depth and kind, and each block's share of a row
eigenbases     each layer's Kronecker eigenbasis
sketch         Algorithm 1: a gradient compressed to K entries
two_sided      TrackStar's projection, the other way to K entries
curvature      R^-1/2 of rows and of a task's queries
rapidgrad      a batch to its RapidGrads: corrected, normalised, compressed
token_scores   heat-maps: each response token's share of an influence
"""
