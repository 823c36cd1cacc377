// KaTeX, on each page that the theme shows.
document$.subscribe(() => renderMathInElement(document.body, {
  delimiters: [{left: "\\(", right: "\\)", display: false}, {left: "\\[", right: "\\]", display: true}],
}))
