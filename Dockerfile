# renio on NVIDIA's PyTorch image, whose torch, triton and Transformer Engine belong together and stay as they are.
#   docker build -t renio .
#   docker build -t renio --build-arg NGC_TAG=26.06-py3 --build-arg RUN_AS=1000:1000 .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" renio train recipe.yaml
ARG NGC_TAG=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}

# The image's PIP_CONSTRAINT also holds packages that this project needs newer; its own list below takes its place.
ENV PIP_CONSTRAINT= \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/renio \
    USER=renio \
    LOGNAME=renio
# Any user may write caches there, also one without an entry in /etc/passwd.
RUN mkdir -p /home/renio /work && chmod 1777 /home/renio /work

WORKDIR /opt/renio
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY examples examples
COPY renio_megatron renio_megatron
RUN ./scripts/image_constraints.sh pins > image.txt \
    && ./scripts/image_constraints.sh constraints image.txt constraints.txt > pip.txt \
    && python -m pip install --no-cache-dir -c pip.txt . \
    && ./scripts/image_constraints.sh pins | diff image.txt - \
    && renio --version

ARG RUN_AS=root
USER ${RUN_AS}
WORKDIR /work
ENTRYPOINT ["renio"]
CMD ["--help"]
