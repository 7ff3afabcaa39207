"""Style and script of report.html. Not here: content."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#15181d;--soft:#5d6673;--faint:#8b94a1;--rule:#e3e6eb;
--grid:#eceef2;--line:#2459d6;--band:#2459d622;--good:#137a4b;--good-bg:#dcf3e6;--bad:#b3261e;--bad-bg:#fbe3e1;
--warn:#7a5300;--warn-bg:#fff3d6;--live:#1d4fc4;--live-bg:#e0e9fd;--pill:19,122,75}
@media(prefers-color-scheme:dark){:root{--bg:#101318;--card:#181c23;--ink:#e8ebf0;--soft:#a2abb8;--faint:#77808d;
--rule:#2a303a;--grid:#242a33;--line:#82a8ff;--band:#82a8ff2e;--good:#6fd6a0;--good-bg:#14382a;--bad:#ff8d84;
--bad-bg:#43201e;--warn:#f0c668;--warn-bg:#3a2f14;--live:#9bb9ff;--live-bg:#1c2c52;--pill:80,200,140}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1240px;margin:0 auto;padding:28px 24px 64px}
h1,h2,h3,h4,p,ul,dl,dd,pre{margin:0;padding:0}ul{list-style:none}
h1{font-size:28px;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;font-size:12.5px}
small{color:var(--soft);font-size:12.5px;font-weight:400}
.title{display:flex;gap:14px;align-items:center;flex-wrap:wrap}
.status{font-weight:600;font-size:13px;padding:3px 11px;border-radius:99px;background:var(--warn-bg);color:var(--warn)}
.status.finished{background:var(--good-bg);color:var(--good)}
.status.failed{background:var(--bad-bg);color:var(--bad)}
.status.running{background:var(--live-bg);color:var(--live)}
.recipe{margin-top:8px;display:flex;gap:4px 10px;flex-wrap:wrap;align-items:baseline;overflow-wrap:anywhere}
.recipe>span:first-child{color:var(--soft)}.recipe .path{color:var(--soft)}
.progress{color:var(--soft);margin-top:2px}.progress b{color:var(--ink);font-weight:600}
.bar{height:4px;border-radius:4px;background:var(--rule);overflow:hidden}.bar div{height:100%;background:var(--line)}
header .bar{margin-top:12px}
.reason{margin-top:12px;padding:10px 14px;border-radius:8px;background:var(--bad-bg);color:var(--bad);
white-space:pre-wrap;overflow-wrap:anywhere}
.warnings{margin-top:16px;padding:10px 14px;border-radius:8px;background:var(--warn-bg);color:var(--warn);font-size:14px}
.warnings summary{font-weight:600;cursor:pointer}.warnings li{margin-top:4px;overflow-wrap:anywhere}
.heroes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px;margin-top:20px}
.wide{grid-column:1/-1}.ends{margin:14px 0 0;padding:0;list-style:none;columns:300px 4;column-gap:28px}
.ends li{display:grid;grid-template-columns:minmax(0,1fr) 80px 58px;gap:10px;align-items:center;font-size:13px;
padding:2px 0;break-inside:avoid}.ends span{overflow-wrap:anywhere}.ends .bar{height:6px}
.ends b{text-align:right;font-weight:600;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px 10px;min-width:0}
.hero{padding:16px 18px 12px}.hero h2{font-size:14px;font-weight:600;color:var(--soft)}
.change{font-size:34px;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums;color:var(--soft)}
.change strong{color:var(--ink)}.change .arrow{margin:0 .3em;color:var(--faint);font-weight:400}
.note{color:var(--soft);font-size:13px;margin-bottom:10px}
.head{font-size:20px;letter-spacing:-.01em;margin:40px 0 4px}.head+.grid,.head+details{margin-top:12px}
h3{font-size:14px;font-weight:600;color:var(--soft);margin:18px 0 8px}
h4{display:flex;gap:8px;align-items:baseline;font-weight:400;font-size:13px;margin-bottom:8px}
h4 code{overflow:hidden;text-overflow:ellipsis}h4 b{margin-left:auto;font-variant-numeric:tabular-nums;white-space:nowrap}
h4 em{font-style:normal;font-size:11.5px;color:var(--faint);white-space:nowrap}.bad,h4 em.bad{color:var(--bad)}
.plot{position:relative;height:112px;margin:0 2px 20px 44px;touch-action:pan-y}.plot.tall{height:230px;margin-top:20px}
.plot:has(.s){margin-top:22px}.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke}
.plot .grid{stroke:var(--grid);stroke-width:1}.plot .stage{stroke:var(--faint);stroke-width:1;stroke-dasharray:3 3}
.plot .line{stroke:var(--line);stroke-width:1.75;stroke-linejoin:round}.plot .band{fill:var(--band)}
.plot .dot{stroke:var(--line);stroke-width:6;stroke-linecap:round}.plot .broken{stroke:var(--bad);stroke-width:2}
.plot i{position:absolute;font:11px/1 system-ui,sans-serif;color:var(--faint);font-variant-numeric:tabular-nums;
white-space:nowrap;pointer-events:none}
.plot .y{right:100%;margin-right:7px;transform:translateY(-50%)}
.plot .x{top:100%;margin-top:6px;transform:translateX(-50%)}
.plot .s{bottom:100%;padding:0 4px 3px 1px;color:var(--soft);overflow:hidden;text-overflow:ellipsis}
.plot .rule{position:absolute;top:0;bottom:0;width:1px;background:var(--faint);pointer-events:none}
.plot .tip{position:absolute;top:-4px;z-index:2;padding:4px 8px;border-radius:6px;background:var(--ink);color:var(--bg);
font-size:12px;line-height:1.35;white-space:nowrap;pointer-events:none;transform:translate(-50%,-100%)}
.flat{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:8px;font-size:13px}
details summary{cursor:pointer}
.samples .list{background:var(--card);border:1px solid var(--rule);border-radius:10px;margin-top:12px}
.samples details+details{border-top:1px solid var(--rule)}.samples summary{padding:6px 14px}.samples summary span{color:var(--soft);margin:0 8px}
.scroll{overflow-x:auto;border-top:1px solid var(--rule)}
table{border-collapse:collapse;width:100%;min-width:500px}
th{font-size:12px;font-weight:400;color:var(--soft);text-align:left;padding:6px 14px}
td{vertical-align:top;padding:8px 14px;border-top:1px solid var(--rule)}
td:nth-child(n+3),th:nth-child(n+3){width:1%}td pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:240px;overflow-y:auto}
.num{white-space:nowrap}.end{white-space:nowrap;color:var(--soft);font-size:13px}.end small{display:block}
.pill{display:inline-block;min-width:46px;text-align:center;border-radius:6px;padding:1px 8px;font-weight:600;
font-variant-numeric:tabular-nums;background:rgba(var(--pill),calc(.04 + .3*var(--level)));border:1px solid var(--rule)}
.pill.missing{background:var(--bad-bg);color:var(--bad)}.none{color:var(--faint)}
.parts{display:inline-block;vertical-align:top;margin-left:10px;font-size:12px;line-height:1.4;color:var(--soft)}.parts b{font-weight:600}
.num .bad{white-space:normal;max-width:220px;font-size:12px;margin-top:4px;overflow-wrap:anywhere}
.phases li{display:grid;grid-template-columns:112px 1fr 76px 38px;gap:10px;align-items:center;font-size:13px;
padding:3px 0}.phases .bar{height:6px}.phases b{text-align:right;font-weight:600;font-variant-numeric:tabular-nums}
.phases small{text-align:right}.phases span{overflow-wrap:anywhere}
.card h4:not(:has(code)){font-weight:600;font-size:14px}
dl{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:3px 14px;font-size:13px}dt{color:var(--soft)}
dd{overflow-wrap:break-word;min-width:0}.facts{grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr))}
.full{margin-top:12px}.full pre{margin-top:10px;overflow-x:auto}.empty{margin-top:28px;color:var(--soft)}
@media(max-width:640px){main{padding:18px 14px 48px}.change{font-size:28px}.plot.tall{height:190px}h1{font-size:23px}
table{min-width:0}thead{display:none}table,tbody,td{display:block}
tr{display:grid;grid-template-columns:1fr auto;border-top:1px solid var(--rule);padding:8px 14px}
td,td:nth-child(n+3){border:0;padding:2px 0;width:auto}td:nth-child(-n+2){grid-column:1/-1}
td:nth-child(-n+2)::before{color:var(--soft);font-size:12px;content:"prompt"}td:nth-child(2)::before{content:"response"}
.end{text-align:right}.phases li{grid-template-columns:90px 1fr 66px 38px}}
@media print{body{background:#fff}.card,.samples .list{break-inside:avoid}}
"""

SCRIPT = """
'use strict';
const show=(v,p)=>v===null?'not finite':p?(100*v).toFixed(1)+' %':String(+v.toPrecision(4));
for(const plot of document.querySelectorAll('.plot')){
 const c=JSON.parse(plot.dataset.c),rule=document.createElement('div'),tip=document.createElement('div');
 rule.className='rule';tip.className='tip';
 const leave=()=>{rule.remove();tip.remove()};
 plot.addEventListener('pointermove',e=>{
  const box=plot.getBoundingClientRect(),at=(e.clientX-box.left)/box.width*1000;
  let i=0;for(let k=1;k<c.x.length;k++)if(Math.abs(c.at[k]-at)<Math.abs(c.at[i]-at))i=k;
  const left=c.at[i]/10;
  rule.style.left=left+'%';tip.style.left=Math.min(86,Math.max(14,left))+'%';
  tip.textContent=(c.n?c.n[c.k[i]]+', ':'')+'step '+c.x[i]+': '+show(c.y[i],c.p)+
   (c.l&&c.l[i]!==null&&c.l[i]!==undefined?'  ('+show(c.l[i],c.p)+' to '+show(c.h[i],c.p)+')':'');
  plot.append(rule,tip)});
 plot.addEventListener('pointerleave',leave);
}
const status=document.querySelector('.status.running');
if(status){const idle=Date.now()/1000-status.dataset.updated;
 if(idle>900)status.textContent='running? last written '+(idle<7200?Math.round(idle/60)+' min':
  Math.round(idle/3600)+' h')+' ago'}
"""
