"""Our models in other people's harnesses; each module needs the harness's own environment, and nothing imports it."""
