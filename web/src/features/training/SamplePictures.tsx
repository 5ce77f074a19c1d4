import { Button } from '@mantine/core';
import { useEffect, useRef, useState } from 'react';
import { useTranslation } from 'react-i18next';
import type { Sampled } from './progress';
import css from './SamplePictures.module.css';
import { asPicture, some } from './samples';

/** What the model drew from the same noise as it learned: a row for each prompt, a column for each step. */
export function SamplePictures({ samples }: { samples: readonly Sampled[] }) {
  const { t } = useTranslation();
  const [all, setAll] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (box.current) box.current.scrollLeft = box.current.scrollWidth; // the newest stand at the end
  }, [samples.length]);
  const shown = all ? samples : some(samples);
  const prompts = samples.at(-1)?.answers.map(({ prompt }) => prompt) ?? [];
  return (
    <>
      <div ref={box} className={css.scroll} tabIndex={0} role="region" aria-label={t('pictured.samples')}>
        <table className={css.table}>
          <thead>
            <tr>
              <th scope="col">{t('pictured.samplesPrompt')}</th>
              {shown.map(({ step }) => (
                <th key={step} scope="col">
                  {t('pictured.samplesStep', { step })}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {prompts.map((prompt, row) => (
              <tr key={row}>
                <th scope="row">{prompt}</th>
                {shown.map(({ step, answers }) => (
                  <td key={step}>
                    <Picture answer={answers[row]?.answer} alt={t('pictured.samplesAlt', { prompt, step })} />
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {samples.length > some(samples).length ? (
        <Button variant="subtle" size="compact-sm" onClick={() => setAll(!all)} style={{ alignSelf: 'flex-start' }}>
          {all ? t('pictured.samplesFew') : t('pictured.samplesAll', { count: samples.length })}
        </Button>
      ) : null}
    </>
  );
}

/** Only what is a picture, however an answer came to be. */
export function Picture({ answer, alt }: { answer: string | undefined; alt: string }) {
  const { t } = useTranslation();
  const src = asPicture(answer);
  return src ? <img className={css.picture} src={src} alt={alt} /> : <span>({t('pictured.noPicture')})</span>;
}
