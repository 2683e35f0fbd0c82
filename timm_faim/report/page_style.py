"""How the page of a run looks."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<main>
{body}
</main>
<footer>timm-faim, {date}; written in {seconds} s</footer>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6873; --line: #d9dee3; --card: #f4f6f8; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa6b2; --line: #39424b; --card: #20272e; --back: #14191e; }
}
body { margin: 0 auto; max-width: 1080px; padding: 1.5rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; }
.cards div { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards span, figcaption, footer { color: var(--soft); font-size: .85rem; }
figure { margin: .8rem 0 1.4rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 8px; display: block; }
figcaption { margin-top: .3rem; max-width: 70ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0 1.4rem; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
dl { columns: 20rem auto; column-gap: 2rem; font-size: .88rem; margin: .6rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  break-inside: avoid; padding: .12rem 0; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 8px; font-size: .85rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .6rem; }
"""
