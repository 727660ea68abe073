"""Models, adapters and memories on the Hub: cards, pushing and pulling with checks, code for people without memzoo."""
