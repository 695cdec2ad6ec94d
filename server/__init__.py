"""MedSora Server: the HTTP API, the job table, the queue and the worker.

Console script ``medsora-server`` (:mod:`server.cli`). The parts and who may import whom:

    api -> jobs <- worker -> medsora        embedded starts all of them; reaper keeps jobs moving

Only a job id travels from the API to a worker; everything else is a row in the database.
"""
