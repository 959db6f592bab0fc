# JupyterLab with Percept on port 8888: docker run --gpus all -p 8888:8888 -v /my/data:/percept/data percept
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /percept
COPY . .
RUN bash setup.sh
EXPOSE 8888
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "--allow-root", "notebooks"]
