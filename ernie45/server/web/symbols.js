// What TeX commands stand for: one character each, by the way it behaves between its neighbours.

const pairs = (text) => new Map(text.trim().split(/\s+/).map((entry) => entry.split("=")));

/** Letters and letter-like signs. */
export const LETTERS = pairs(`
alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ mu=μ nu=ν xi=ξ omicron=ο
pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ omega=ω
Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω
infty=∞ partial=∂ nabla=∇ hbar=ℏ ell=ℓ Re=ℜ Im=ℑ aleph=ℵ emptyset=∅ varnothing=∅ forall=∀ exists=∃ nexists=∄ top=⊤ bot=⊥ angle=∠
imath=ı jmath=ȷ wp=℘ degree=° square=□ blacksquare=■ triangle=△ checkmark=✓ dagger=† ddagger=‡ prime=′ complement=∁ S=§ P=¶
`);

/** Operators, relations, arrows and punctuation. */
export const OPERATORS = pairs(`
pm=± mp=∓ times=× div=÷ cdot=⋅ ast=∗ star=⋆ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ odot=⊙ wedge=∧ land=∧ vee=∨ lor=∨ cap=∩ cup=∪
setminus=∖ neg=¬ lnot=¬ le=≤ leq=≤ leqslant=⩽ ge=≥ geq=≥ geqslant=⩾ ne=≠ neq=≠ ll=≪ gg=≫ equiv=≡ approx=≈ sim=∼ simeq=≃ cong=≅ propto=∝
doteq=≐ prec=≺ succ=≻ preceq=⪯ succeq=⪰ in=∈ notin=∉ ni=∋ subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ mid=∣ nmid=∤ parallel=∥
perp=⊥ models=⊨ vdash=⊢ dashv=⊣ therefore=∴ because=∵ to=→ rightarrow=→ gets=← leftarrow=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐
Leftrightarrow=⇔ iff=⟺ implies=⟹ impliedby=⟸ longrightarrow=⟶ longleftarrow=⟵ longleftrightarrow=⟷ Longrightarrow=⟹ Longleftarrow=⟸
mapsto=↦ longmapsto=⟼ hookrightarrow=↪ rightharpoonup=⇀ rightleftharpoons=⇌ uparrow=↑ downarrow=↓ updownarrow=↕ nearrow=↗ searrow=↘
ldots=… dots=… dotsc=… cdots=⋯ dotsb=⋯ vdots=⋮ ddots=⋱ colon=: lt=< gt=> coloneqq=≔ triangleq=≜ asymp=≍ bowtie=⋈ leadsto=⇝
langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ lvert=| rvert=| vert=| lVert=‖ rVert=‖ Vert=‖ |=‖ {={ }=} backslash=\\ lbrace={ rbrace=}
`);

/** Operators that grow, and whether their limits stand above and below in a displayed formula. */
export const BIG = new Map(Object.entries({
  sum: ["∑", true], prod: ["∏", true], coprod: ["∐", true], bigcup: ["⋃", true], bigcap: ["⋂", true], bigoplus: ["⨁", true],
  bigotimes: ["⨂", true], bigvee: ["⋁", true], bigwedge: ["⋀", true], int: ["∫", false], iint: ["∬", false], iiint: ["∭", false], oint: ["∮", false],
}));

/** Functions with upright names; true: a limit stands below the name. */
export const FUNCTIONS = new Map([
  ..."sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp deg dim ker hom arg".split(" ").map((name) => [name, false]),
  ..."lim liminf limsup max min sup inf det gcd Pr argmax argmin".split(" ").map((name) => [name, true]),
]);

export const ACCENTS = pairs("hat=^ widehat=^ bar=¯ overline=¯ tilde=~ widetilde=~ vec=→ overrightarrow=→ dot=˙ ddot=¨ check=ˇ breve=˘ acute=´ grave=`");

/** Spaces, in em. */
export const SPACES = new Map(Object.entries({
  ",": 0.167, ":": 0.222, ">": 0.222, ";": 0.278, "!": -0.167, " ": 0.333, quad: 1, qquad: 2, enspace: 0.5, thinspace: 0.167,
}));

/** Alphabets: where A, a and 0 begin in Unicode, and the letters that stand elsewhere for reasons of history. */
export const ALPHABETS = new Map(Object.entries({
  mathbb: { A: 0x1d538, a: 0x1d552, 0: 0x1d7d8, C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
  mathcal: { A: 0x1d49c, a: 0x1d4b6, B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  mathscr: { A: 0x1d49c, a: 0x1d4b6, B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  mathfrak: { A: 0x1d504, a: 0x1d51e, C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
  mathbf: { A: 0x1d400, a: 0x1d41a, 0: 0x1d7ce },
  boldsymbol: { A: 0x1d468, a: 0x1d482, 0: 0x1d7ce, h: "𝒉" },
  bm: { A: 0x1d468, a: 0x1d482, 0: 0x1d7ce, h: "𝒉" },
  mathsf: { A: 0x1d5a0, a: 0x1d5ba, 0: 0x1d7e2 },
  mathtt: { A: 0x1d670, a: 0x1d68a, 0: 0x1d7f6 },
  mathrm: {}, mathit: {}, mathnormal: {}, rm: {},
}));
