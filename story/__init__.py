"""A model from nothing: a small mixture of experts that sees, trained, aligned, quantised and served by this project's own commands.

`make story`, or `python -m story`. Never imported by the package. Read in this order: `course` (the steps), `scenes` (what pictures show),
`rows` (what is asked about them), `exam` (how it is judged), `page` (what is told).
"""
