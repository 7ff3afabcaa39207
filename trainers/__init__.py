"""The DeepSpeed engine wrapper, weight publishing, and one file per method: a config and a loop. No formulas here."""
