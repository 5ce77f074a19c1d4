import css from './LayerStrip.module.css';

/** The stack of layers as a small picture, without words: decoration beside text that says the same. */
export function LayerStrip({ n, chosen }: { n: number; chosen: (layer: number) => boolean }) {
  return (
    <svg className={css.strip} viewBox={`0 0 ${n * 9} 34`} width={n * 9} height={34} aria-hidden="true">
      {Array.from({ length: n }, (_, i) => (
        <rect key={i} x={i * 9 + 1} y={1} width={7} height={32} rx={2.2} className={chosen(i) ? css.on : css.off} />
      ))}
    </svg>
  );
}
