"""Every method side by side: equal steps, equal data, equal searches of the learning rate, several seeds.

    cases        which cases there are, and the parameters of each
    run          stage `compare`: runs the cases whose results are missing or stale, several at a time
    case         one case, from calibration to the scores of its packed model
    reference    the full-precision model's answers, which every case is scored against
    tuning       chooses each method's learning rate
    store        the result files: what made a result, when it is stale
    fingerprint  how each method behaves on a tiny model: the only thing about the code that results depend on
    report/      stage `report`: table, plots and page

Settings are in params.yaml, what was measured in results/, what it means in findings.md.
"""
