"""Cut FFNs by torch's own products, each over a strip of units for the tokens that use them.

`engine` runs them as `plan` cuts them, and `columns` has the products with one column per token. What pays depends on
the machine: `costs` measures what products take, `orders` which order is quicker, both by the clock in `cold_clock`.
"""
