# docker build -t burn-engine . && docker run --gpus all --shm-size 16g -v /data/imagenet:/app/data/imagenet burn-engine \
#   torchrun --nproc_per_node=8 tools/train.py recipes/burn_stage1.yaml
FROM python:3.11-slim
# libnvcuvid, which opens the GPU's JPEG decoder, comes with the capability `video`; --gpus all alone does not ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
RUN apt-get update && apt-get install -y --no-install-recommends git make gcc g++ libc6-dev libjpeg-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY setup.cfg setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY engine engine
COPY models models
COPY loaders loaders
COPY runtime runtime
RUN pip install --no-cache-dir --editable ".[demo,dali]"
COPY recipes recipes
COPY tools tools
CMD ["python", "tools/demo.py"]
