# fastclstm with its kernels compiled beforehand. docs/guides/containers.md explains it; tests/test_containers.py runs what it runs.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS base
ENV PATH=/opt/fastclstm/bin:$PATH FASTCLSTM_CACHE_DIR=/opt/kernels
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

FROM base AS build
COPY . /src
RUN python -m venv /opt/fastclstm && pip install --no-cache-dir /src
RUN python -m fastclstm warmup --forward-only
RUN chmod -R a=rX /opt/kernels

FROM base
COPY --from=build /opt /opt
USER 10001:10001
ENTRYPOINT ["python", "-m", "fastclstm"]
CMD ["info"]
