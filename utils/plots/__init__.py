"""Pictures of a run. Functions take numbers and write a file; none of them knows a model.

Drawn with matplotlib's `Figure` alone: no pyplot, hence no window, no global state and no
display needed. Boxes on images are drawn with Pillow, which matplotlib brings along.

Matplotlib is imported by the functions that use it: that takes 0.3 s, and every command loads these
modules, while the first picture, if there is any, comes long after the start.
"""
