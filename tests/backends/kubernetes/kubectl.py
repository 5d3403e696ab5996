"""kubectl for the tests: hands its arguments to the cluster that plays the manifests, and prints the answer."""

import json
import os
import socket
import sys
import time
from pathlib import Path


def main():
    words = sys.argv[1:]
    document = sys.stdin.read() if "--filename=-" in words else ""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(os.environ["TEST_CLUSTER"])
        peer.sendall(json.dumps({"words": words, "document": document}).encode() + b"\n")
        answer = json.loads(peer.makefile().readline())
    sys.stdout.write(answer["out"])
    sys.stderr.write(answer["error"])
    if "follow" in answer:
        follow(Path(answer["follow"]), Path(answer["until"]))
    sys.exit(1 if answer["error"] else 0)


def follow(log, end):
    with log.open() as file:
        while True:
            is_over = end.exists()
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if is_over:
                return
            time.sleep(0.1)


main()
