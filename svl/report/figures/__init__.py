"""The figures of a report, drawn from plain numbers.

`matplotlib.figure.Figure` objects without pyplot, so no global state and no display. Colours are told apart by people
with colour-vision deficiencies (Okabe-Ito), and never carry a meaning alone. Sizes are chosen for a width of 1000
pixels or one text column of a paper.
"""
