# Percept in a container (docs/launching.md); built and run nowhere yet.
#   docker run --gpus all -p 8888:8888 -v percept:/data percept                               JupyterLab; the address with its token is in the log
#   docker run --gpus all --shm-size 8g -v percept:/data percept python run.py mindeye --mini    a recipe
FROM python:3.11.13-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends git make wordnet-base && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home percept && mkdir /percept /data && chown percept:percept /percept /data
USER percept
WORKDIR /percept
COPY --chown=percept:percept . .
RUN UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 bash setup.sh --all
ENV PATH=/percept/.venv/bin:$PATH PERCEPT_HOME=/data
VOLUME /data
EXPOSE 8888
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "notebooks"]
