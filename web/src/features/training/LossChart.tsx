import { useElementSize } from '@mantine/hooks';
import { useMemo, useState } from 'react';
import { useTranslation } from 'react-i18next';
import css from './LossChart.module.css';
import { smooth, type Point } from './progress';
import { ticks } from './ticks';

const HEIGHT = 260;
const PAD = { left: 44, right: 14, top: 12, bottom: 28 };

interface Props {
  train: readonly Point[];
  valid: readonly Point[];
  totalSteps: number | null;
}

/** The loss over steps: each step pale, their mean strong, validation as dots. */
export function LossChart({ train, valid, totalSteps }: Props) {
  const { t } = useTranslation();
  const { ref, width: measured } = useElementSize();
  const [pointed, setPointed] = useState<number | null>(null);
  const width = Math.max(measured, 260);
  const mean = useMemo(() => smooth(train), [train]);
  const all = [...train, ...valid].map((point) => point.loss);
  const yTicks = ticks(Math.min(...all), Math.max(...all), 5);
  const [yLow, yHigh] = [yTicks[0] ?? 0, yTicks.at(-1) ?? 1];
  const lastStep = Math.max(totalSteps ?? 0, train.at(-1)?.step ?? 1, 2);
  const xTicks = ticks(0, lastStep, Math.min(6, Math.floor(width / 80))).filter(
    (step) => step <= lastStep && Number.isInteger(step),
  );
  const x = (step: number) => PAD.left + ((width - PAD.left - PAD.right) * step) / lastStep;
  const y = (loss: number) => PAD.top + (HEIGHT - PAD.top - PAD.bottom) * (1 - (loss - yLow) / (yHigh - yLow || 1));
  const path = (points: readonly Point[]) =>
    points.map((point, i) => `${i ? 'L' : 'M'}${x(point.step).toFixed(1)} ${y(point.loss).toFixed(1)}`).join('');
  const [first, last] = [mean[0], mean.at(-1)];
  if (!first || !last) return null;
  const at =
    pointed === null ? null : nearest(train, ((pointed - PAD.left) / (width - PAD.left - PAD.right)) * lastStep);
  const atMean = at === null ? null : mean[at];
  const atPoint = at === null ? null : train[at];
  const summary = t('job.lossSummary', { first: first.loss.toFixed(3), last: last.loss.toFixed(3), steps: last.step });
  return (
    <div ref={ref} className={css.box}>
      <svg
        className={css.chart}
        viewBox={`0 0 ${width} ${HEIGHT}`}
        height={HEIGHT}
        role="img"
        aria-label={summary}
        onPointerMove={(event) => setPointed(event.clientX - event.currentTarget.getBoundingClientRect().left)}
        onPointerLeave={() => setPointed(null)}
      >
        {yTicks.map((value) => (
          <g key={value}>
            <line className={css.grid} x1={PAD.left} x2={width - PAD.right} y1={y(value)} y2={y(value)} />
            <text className={css.label} x={PAD.left - 8} y={y(value) + 4} textAnchor="end">
              {Number(value.toFixed(4))}
            </text>
          </g>
        ))}
        {xTicks.map((step) => (
          <text key={step} className={css.label} x={x(step)} y={HEIGHT - 8} textAnchor="middle">
            {step}
          </text>
        ))}
        <path className={css.raw} d={path(train)} />
        <path className={css.mean} d={path(mean)} />
        {train.length === 1 ? <circle className={css.dot} cx={x(first.step)} cy={y(first.loss)} r={3.5} /> : null}
        {valid.map((point) => (
          <circle key={point.step} className={css.valid} cx={x(point.step)} cy={y(point.loss)} r={4} />
        ))}
        {atPoint && atMean ? (
          <>
            <line
              className={css.cursor}
              x1={x(atPoint.step)}
              x2={x(atPoint.step)}
              y1={PAD.top}
              y2={HEIGHT - PAD.bottom}
            />
            <circle className={css.dot} cx={x(atMean.step)} cy={y(atMean.loss)} r={4} />
          </>
        ) : null}
      </svg>
      <div className={css.legend}>
        <span data-line="mean">{t('job.smoothed')}</span>
        <span data-line="raw">{t('job.trainLoss')}</span>
        {valid.length > 0 ? <span data-line="valid">{t('job.validLoss')}</span> : null}
        <span className={css.read}>
          {atPoint && atMean
            ? `${t('job.step')} ${atPoint.step}: ${atPoint.loss.toFixed(3)} (${atMean.loss.toFixed(3)})`
            : `${t('job.lossFrom', { loss: first.loss.toFixed(3) })} · ${t('job.lossNow', { loss: last.loss.toFixed(3) })}`}
        </span>
      </div>
    </div>
  );
}

function nearest(points: readonly Point[], step: number): number | null {
  let best: number | null = null;
  points.forEach((point, i) => {
    if (best === null || Math.abs(point.step - step) < Math.abs((points[best]?.step ?? 0) - step)) best = i;
  });
  return best;
}
