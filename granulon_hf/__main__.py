from granulon_hf.cli import main

main()
