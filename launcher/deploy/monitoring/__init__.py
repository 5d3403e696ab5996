"""What Prometheus and Grafana need to watch servers and training runs."""
