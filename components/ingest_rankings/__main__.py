from components.services.launch import main

main("ingest_rankings")
