"""The asyncio side of a server: requests in flight, engines behind links, results kept. No HTTP and no torch."""
