import { Select } from '@mantine/core';
import { useState } from 'react';
import { useTranslation } from 'react-i18next';
import type { Sampled } from './progress';
import css from './SampleAnswers.module.css';

/** What the model answered to the user's prompts, at the newest step or at any before. */
export function SampleAnswers({ samples }: { samples: readonly Sampled[] }) {
  const { t } = useTranslation();
  const [chosen, setChosen] = useState<number | null>(null); // null: the newest, also when another comes
  const shown = samples.find(({ step }) => step === chosen) ?? samples.at(-1);
  if (!shown) return null;
  return (
    <>
      {samples.length > 1 ? (
        <Select
          label={t('run.samplesAt')}
          value={String(shown.step)}
          onChange={(step) => setChosen(Number(step) === samples.at(-1)?.step ? null : Number(step))}
          data={samples.map(({ step }) => ({ value: String(step), label: t('run.sampleStep', { step }) })).reverse()}
          allowDeselect={false}
          maw={240}
        />
      ) : null}
      <dl className={css.list}>
        {shown.answers.map(({ prompt, answer }, i) => (
          <div key={i}>
            <dt>{prompt}</dt>
            <dd>{answer || t('run.samplesEmpty')}</dd>
          </div>
        ))}
      </dl>
    </>
  );
}
