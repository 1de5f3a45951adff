"""The row of :mod:`trial_technique`, as a plugin for pytest and for programs of their own."""

from aimet_ext.registry import TECHNIQUES, Technique

ROW = Technique(
    name="trial",
    function="trial_technique:apply_trial",
    params="trial_technique:TrialParams",
    decides="integers",
    olive="trial",
)
TECHNIQUES[ROW.name] = ROW
