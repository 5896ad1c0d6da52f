"""Configuration: schema, presets and overrides, cross-field checks, and the plan. Knows no torch."""
