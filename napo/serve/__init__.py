"""`napo serve`: a run's recommendations over HTTP. Needs the extra ``serve`` (FastAPI and uvicorn)."""

from napo.serve.limits import Limits

__all__ = ["Limits"]
