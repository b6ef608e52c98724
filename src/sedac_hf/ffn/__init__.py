"""FFNs of a foreign model: where they are, how their linears are cut, what decides which units a token needs."""
