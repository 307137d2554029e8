from svl.cli import main

main()
