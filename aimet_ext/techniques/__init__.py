"""The techniques: one ``apply_<name>`` each, loops over blocks on top of :mod:`aimet_ext.core`."""
