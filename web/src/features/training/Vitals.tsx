import { bytes } from '@/lib/format';
import type { DataKind } from '@/types/api';
import type { ReactNode } from 'react';
import { useTranslation } from 'react-i18next';
import { READINGS, type Progress, type Reading, type Value } from './progress';
import css from './Vitals.module.css';

const DRAWN: readonly Reading[] = ['learning_rate', 'gradient_norm'];

/** What the last step said beside its loss. Nothing at all where it said nothing. */
export function Vitals({ progress, kind }: { progress: Progress; kind: DataKind }) {
  const { t } = useTranslation();
  const ofPictures = kind === 'pictures';
  const shown: [string, string, ReactNode?][] = READINGS.flatMap((name) => {
    const values = progress.readings[name];
    const last = values.at(-1);
    if (!last || (ofPictures && name === 'perplexity')) return [];
    const number = figure(last.value);
    const told =
      name === 'memory_bytes'
        ? bytes(last.value)
        : name === 'tokens_per_s'
          ? ofPictures
            ? t('pictured.perSecond', { count: Number(last.value.toPrecision(2)) })
            : t('run.perSecond', { count: Math.round(last.value) })
          : number;
    const title = t(`run.${name}`);
    return [[title, told, DRAWN.includes(name) ? <Curve key={name} name={title} values={values} /> : null]];
  });
  const valid = progress.valid.at(-1);
  if (valid) shown.push([t('run.validation_loss'), valid.loss.toFixed(3)]);
  return (
    <dl className={css.vitals}>
      {shown.map(([title, value, curve]) => (
        <div key={title}>
          <dt>{title}</dt>
          <dd>
            {value}
            {curve}
          </dd>
        </div>
      ))}
    </dl>
  );
}

export const hasVitals = (progress: Progress): boolean =>
  progress.valid.length > 0 || READINGS.some((name) => progress.readings[name].length > 0);

const figure = (value: number): string =>
  value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(2) : Number(value.toPrecision(3)).toString();

function Curve({ name, values }: { name: string; values: readonly Value[] }) {
  const { t } = useTranslation();
  const [first, last] = [values[0], values.at(-1)];
  if (!first || !last || values.length < 2) return null;
  const highest = values.reduce((most, each) => Math.max(most, each.value), -Infinity);
  const lowest = values.reduce((least, each) => Math.min(least, each.value), Infinity);
  const width = last.step - first.step || 1;
  const height = highest - lowest || 1;
  const line = values.map(
    ({ step, value }, i) =>
      `${i ? 'L' : 'M'}${((100 * (step - first.step)) / width).toFixed(2)} ${(30 - (30 * (value - lowest)) / height).toFixed(2)}`,
  );
  const summary = t('run.curve', {
    name,
    first: figure(first.value),
    last: figure(last.value),
    highest: figure(highest),
    lowest: figure(lowest),
  });
  return (
    <svg className={css.curve} viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label={summary}>
      <path d={line.join('')} />
    </svg>
  );
}
