/** What each dial does, drawn small, and moving with it. */
import { useTranslation } from 'react-i18next';
import css from './DialPicture.module.css';
import { strength, type Dial } from './dials';

const W = 76;
const H = 44;
const BARS = [0.95, 0.28, 0.62, 0.16, 0.8, 0.4];
const WORDS = [8, 28, 48, 68];

export function DialPicture({ dial, value }: { dial: Dial; value: number }) {
  const { t } = useTranslation();
  const s = strength(dial, value);
  return (
    <svg
      className={css.picture}
      viewBox={`0 0 ${W} ${H}`}
      width={W}
      height={H}
      role="img"
      aria-label={t(`dials.${dial}_picture`)}
    >
      {dial === 'eps' ? <Norm s={s} /> : dial === 'attn' ? <Attention s={s} /> : <Mlp s={s} />}
    </svg>
  );
}

/** x / sqrt(x² + eps): as eps grows, the bars lose their differences and their height. */
function Norm({ s }: { s: number }) {
  const fog = Math.max(0, (s - 0.5) / 0.5) ** 1.5;
  return (
    <>
      <line x1={2} x2={W - 2} y1={H - 4} y2={H - 4} className={css.faint} />
      {BARS.map((bar, i) => {
        const height = 4 + 32 * (bar * (1 - fog) + 0.14 * fog);
        return (
          <rect
            key={i}
            className={css.fill}
            x={4 + i * 12}
            width={8}
            rx={2}
            y={H - 4 - height}
            height={height}
            opacity={1 - 0.55 * fog}
          />
        );
      })}
    </>
  );
}

/** Each word looks back at those before it. */
function Attention({ s }: { s: number }) {
  const arcs = WORDS.flatMap((to, j) => WORDS.slice(0, j).map((from, i) => ({ from, to, near: 1 / (j - i) })));
  return (
    <>
      {arcs.map(({ from, to, near }) => (
        <path
          key={`${from}-${to}`}
          className={css.line}
          d={`M${from} ${H - 11}Q${(from + to) / 2} ${H - 14 - (to - from) * 0.9} ${to} ${H - 11}`}
          strokeWidth={0.5 + 3.4 * s * near}
          opacity={0.25 + 0.6 * s * near}
        />
      ))}
      {WORDS.map((x) => (
        <rect key={x} className={css.fill} x={x - 6} y={H - 10} width={12} height={6} rx={2} />
      ))}
    </>
  );
}

/** Few, many, few: the wide middle holds what was learned. */
function Mlp({ s }: { s: number }) {
  const left = [14, 30];
  const middle = [5, 13.5, 22, 30.5, 39];
  return (
    <>
      {middle.flatMap((y) =>
        left.flatMap((end, i) => [
          <line key={`l${y}${i}`} className={css.faint} x1={12} y1={end} x2={38} y2={y} />,
          <line key={`r${y}${i}`} className={css.faint} x1={38} y1={y} x2={64} y2={end} />,
        ]),
      )}
      {middle.map((y) => (
        <circle key={y} className={css.fill} cx={38} cy={y} r={1.4 + 3.2 * s} opacity={0.35 + 0.65 * s} />
      ))}
      {left.flatMap((y) => [
        <circle key={`a${y}`} className={css.plain} cx={12} cy={y} r={3.4} />,
        <circle key={`b${y}`} className={css.fill} cx={64} cy={y} r={2 + 2.4 * s} />,
      ])}
    </>
  );
}
